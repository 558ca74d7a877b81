"""Kernels of float32 samples, by products of matrices: digits, gradients, and where they end."""

import math
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from functionals import FUNCTIONALS, over_few_functionals, samples, tensors
from grids import over, over_cases, small_tiles
from torch.autograd import forward_ad

import renyi_kd
from renyi_kd import SampleGram


def rbf_of_samples(x):
    return SampleGram(x, renyi_kd.rbf_kernel, bandwidth=2 * x.shape[-1] ** 0.5)


def rbf_matrix(x):
    return renyi_kd.rbf_kernel(x, bandwidth=2 * x.shape[-1] ** 0.5)


def draws(n, d, offset):
    generator = torch.Generator().manual_seed(0)
    shared, *own = torch.randn(4, n, d, generator=generator)
    return [(shared + each + offset).requires_grad_() for each in own]


@pytest.mark.parametrize("make", [rbf_of_samples, rbf_matrix])
@pytest.mark.parametrize("offset", [0, 10])
@over("n, d", [(64, 100), (530, 8)], slow=[(16, 3), (300, 8), (600, 700)])
@over("alpha", [2], slow=[3])
@over_cases("functional", FUNCTIONALS, fast=["mutual information"])
def test_values_and_gradients_are_those_of_float64(functional, alpha, n, d, offset, make):
    """The same samples in float64 have their distances one by one."""
    x = draws(n, d, offset)
    exact = [z.detach().double().requires_grad_() for z in x]
    value, expected = (functional(renyi_kd, *map(make, z), alpha=alpha) for z in (x, exact))
    assert value.dtype == torch.float32
    rounding = 6e-8 * abs(expected.item())
    assert value.item() == pytest.approx(expected.item(), abs=1e-6 + rounding)
    found, wanted = (
        torch.autograd.grad(v, z, allow_unused=True) for v, z in ((value, x), (expected, exact))
    )
    for gradient, of_float64 in zip(found, wanted, strict=True):
        assert (gradient is None) == (of_float64 is None)
        if gradient is not None:
            assert (gradient - of_float64).norm() < 1e-4 * of_float64.norm()


@over("n, d", [(12, 3), (530, 3)], slow=[(12, 500), (530, 100)])
def test_order_2_of_samples_against_the_reference(n, d):
    """In float64, by one tile and by several."""
    x = samples(n, d)
    bandwidth = 2 * d**0.5
    grams = [SampleGram(z, renyi_kd.rbf_kernel, bandwidth=bandwidth) for z in tensors(x)]
    of_reference = [reference.rbf_kernel(z, bandwidth=bandwidth) for z in x]
    for functional in FUNCTIONALS.values():
        value = functional(renyi_kd, *grams, alpha=2)
        expected = functional(reference, *of_reference, alpha=2)
        assert value.item() == pytest.approx(expected, abs=5e-11)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("d", [2, 12])
@over_few_functionals
def test_derivatives_of_order_2_of_samples(functional, d):
    """Once by tiles that are made anew or kept, and twice."""

    def value(*x):
        grams = [SampleGram(z, renyi_kd.rbf_kernel, bandwidth=2.0 * d**0.5) for z in x]
        return functional(renyi_kd, *grams, alpha=2)

    x = tensors(samples(7, d), requires_grad=True)
    assert torch.autograd.gradcheck(value, x, atol=1e-8, rtol=1e-6)
    if d == 2:
        assert torch.autograd.gradgradcheck(value, x, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("d", [1, 5])
def test_derivatives_of_the_kernel(d):
    """For any gradient that comes back, not only a symmetric one."""
    (x,) = tensors(samples(6, d, 1), requires_grad=True)
    weights = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(x, bandwidth):
        return (renyi_kd.rbf_kernel(x, bandwidth=bandwidth) * weights).sum()

    bandwidth = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (x, bandwidth))
    assert torch.autograd.gradgradcheck(value, (x, bandwidth))


def test_a_second_derivative_in_float32():
    (x,) = tensors(samples(20, 3, 1), torch.float32, requires_grad=True)

    def hessian_product(x):
        value = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x, bandwidth=2.0))
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = hessian_product(x.detach().double().requires_grad_())
    assert (hessian_product(x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("make", [rbf_of_samples, rbf_matrix])
@pytest.mark.parametrize("n", [40, 600])
def test_neither_autocast_nor_reduced_precision_touches_the_product(make, n):
    x = draws(n, 20, 0)[0]

    def step():
        value = renyi_kd.renyi_entropy(make(x))
        return value, torch.autograd.grad(value, x)[0]

    expected = step()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = step()
    assert all(map(torch.equal, under_autocast, expected))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for found, of_highest in zip(step(), expected, strict=True):
            torch.testing.assert_close(found, of_highest, rtol=1e-4, atol=1e-6)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n", [64, 600])
def test_near_duplicates_keep_their_digits_in_float64(n):
    """At a spread of a hundredth of the bandwidth, for which the documentation asks for float64."""
    x, y = (1 + 1e-2 * z for z in samples(n, 3, 2))
    expected = reference.renyi_mutual_information(
        *(reference.rbf_kernel(z, bandwidth=1.0) for z in (x, y)), alpha=2
    )
    for make in (SampleGram, lambda z, kernel, bandwidth: kernel(z, bandwidth=bandwidth)):
        grams = [make(z, renyi_kd.rbf_kernel, bandwidth=1.0) for z in tensors([x, y])]
        value = renyi_kd.renyi_mutual_information(*grams)
        assert value.item() == pytest.approx(expected, rel=1e-3)


def test_an_outlier_does_not_hide_the_others_in_float32():
    x = torch.randn(601, 3, generator=torch.Generator().manual_seed(0))
    for place in (0, 300, 600):
        spoiled = x.clone()
        spoiled[place] = 1e12
        value = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(spoiled, bandwidth=2.0))
        expected = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(spoiled.double(), bandwidth=2.0))
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("make", [rbf_of_samples, rbf_matrix])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [40, 600])
def test_samples_that_are_not_finite_give_a_result_that_is_not(make, bad, n):
    x = draws(n, 3, 0)[0].detach()
    x[5, 1] = bad
    x.requires_grad_()
    value = renyi_kd.renyi_entropy(make(x))
    assert not value.isfinite()
    assert not torch.autograd.grad(value, x)[0].isfinite().all()


@small_tiles
def test_equal_samples_stay_equal():
    """Whose inner products are rounded alike."""
    x = torch.randn(150, 20, generator=torch.Generator().manual_seed(0)) * 30
    gram = renyi_kd.rbf_kernel(x.repeat(2, 1), bandwidth=1.0)
    assert np.abs(gram[:150, 150:].diagonal().numpy() - 1).max() < 1e-2
    assert (gram.diagonal() == 1).all()


def test_an_outlier_does_not_hide_the_others_in_compiled_code():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    x[5] = 1e6

    def kernel(x):
        return renyi_kd.rbf_kernel(x, bandwidth=1.0)

    compiled = torch.compile(kernel, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled.double(), kernel(x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_of_equal_samples(dtype):
    """The kernel of two is -|a - b|^2 / 2 to second order."""
    two = torch.ones(2, 2, dtype=dtype)
    hessian = torch.func.hessian(lambda z: renyi_kd.rbf_kernel(z, bandwidth=1.0)[0, 1])(two)
    identity = torch.eye(2, dtype=dtype)
    for i, j in np.ndindex(2, 2):
        torch.testing.assert_close(hessian[i, :, j, :], identity if i != j else -identity)


def test_forward_mode_by_the_bandwidth_of_samples():
    (x,) = tensors(samples(9, 3, 1))

    def value(bandwidth):
        return renyi_kd.renyi_entropy(SampleGram(x, renyi_kd.rbf_kernel, bandwidth=bandwidth))

    bandwidth = torch.tensor(1.3, dtype=torch.float64)
    _, slope = torch.func.jvp(value, (bandwidth,), (torch.ones_like(bandwidth),))
    expected = (value(bandwidth + 1e-5) - value(bandwidth - 1e-5)) / 2e-5
    assert slope.item() == pytest.approx(expected.item(), rel=1e-6)
    with forward_ad.dual_level():
        result = value(forward_ad.make_dual(bandwidth, torch.ones_like(bandwidth)))
        assert forward_ad.unpack_dual(result).tangent.item() == pytest.approx(slope.item())


def test_a_bandwidth_of_samples_is_checked():
    (x,) = tensors(samples(9, 3, 1))
    with pytest.raises(ValueError, match="`kernel` must make"):
        SampleGram(x, renyi_kd.rbf_kernel, bandwidth=torch.ones(3, 1, 1))
    gram = SampleGram(x, renyi_kd.rbf_kernel, bandwidth=Fraction(3, 2))
    expected = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x, bandwidth=1.5))
    torch.testing.assert_close(renyi_kd.renyi_entropy(gram), expected)
