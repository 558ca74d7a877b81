"""Large matrices, by Frobenius norms tile by tile and by powers."""

import math

import numpy as np
import pytest
import reference
import torch
from functionals import FUNCTIONALS, tensors
from grids import over, over_cases
from strategies import FAMILIES, gram_with_spectrum

import renyi_kd


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@over("alpha", [2, 3, 9], slow=[4, 5, 8, 32])
@over("family", ["full rank", "rank one"], slow=["low rank", "rbf", "linear"])
def test_large_matrices(family, alpha, dtype):
    rng = np.random.default_rng(0)
    grams = [torch.tensor(FAMILIES[family](520, rng)).to(dtype) for _ in range(2)]
    for arguments in ([grams[0]], grams):
        value = renyi_kd.renyi_joint_entropy(*(x.requires_grad_() for x in arguments), alpha=alpha)
        without_gradient = renyi_kd.renyi_joint_entropy(
            *(x.detach() for x in arguments), alpha=alpha
        )
        rounded = [x.detach().double().numpy() for x in arguments]
        expected = reference.renyi_joint_entropy(*rounded, alpha=alpha)
        within = 1e-11 if dtype == torch.float64 else 1e-6
        assert value.item() == pytest.approx(expected, abs=within)
        assert without_gradient.item() == pytest.approx(expected, abs=within)
    (gradient,) = torch.autograd.grad(renyi_kd.renyi_entropy(grams[0], alpha), grams[0])
    expected = reference.renyi_entropy_gradient(grams[0].detach().double().numpy(), alpha)
    within = 1e-11 if dtype == torch.float64 else 2e-6
    assert np.linalg.norm(gradient.numpy() - expected) < within * np.linalg.norm(expected)


@pytest.mark.usefixtures("small_tiles")
@over_cases("functional", FUNCTIONALS, fast=["two to one"])
@over("alpha", [2, 3], slow=[4, 7])
def test_gradients_of_large_matrices(functional, alpha):
    """Not symmetric; once and twice differentiated."""
    rng = np.random.default_rng(0)
    grams = [
        gram_with_spectrum(rng.uniform(0.2, 1, 7), rng) + 0.01 * rng.normal(size=(7, 7))
        for _ in range(3)
    ]
    arguments = tensors(grams, requires_grad=True)

    def value(*grams):
        return functional(renyi_kd, *grams, alpha=alpha)

    assert torch.autograd.gradcheck(value, arguments, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradgradcheck(value, arguments, atol=1e-6, rtol=1e-4)
    only_one = [arguments[0], *(x.detach() for x in arguments[1:])]
    torch.testing.assert_close(
        torch.autograd.grad(value(*only_one), arguments[0])[0],
        torch.autograd.grad(value(*arguments), arguments[0])[0],
    )


@pytest.mark.parametrize("alpha", [2, 3, 5])
@pytest.mark.parametrize("n", [6, 520])
def test_vmap_compile_and_half_types(alpha, n):
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grams = renyi_kd.rbf_kernel(x, bandwidth=1.0).requires_grad_()

    def value(gram):
        return renyi_kd.renyi_entropy(gram, alpha)

    expected = value(grams)
    (gradient,) = torch.autograd.grad(expected.sum(), grams)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")(grams)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), grams)[0], gradient)
    torch.testing.assert_close(torch.func.vmap(value)(grams), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(grams), gradient)
    half = grams.detach().half()
    torch.testing.assert_close(value(half), value(half.float()), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value(half), value(half.float()), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_large_matrix_does_not_matter(alpha, scale):
    gram = torch.tensor(FAMILIES["rbf"](520, np.random.default_rng(0))).float()
    scaled = (gram * scale).requires_grad_()
    value = renyi_kd.renyi_mutual_information(scaled, scaled, alpha)
    expected = renyi_kd.renyi_mutual_information(gram, gram, alpha)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(value * scale, scaled)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [2, 3])
def test_large_matrices_of_zeros_and_of_nan(alpha):
    zero = torch.zeros(520, 520, requires_grad=True)
    other = renyi_kd.rbf_kernel(torch.randn(520, 2, generator=torch.Generator().manual_seed(0)))
    value = renyi_kd.renyi_entropy(zero, alpha)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert (torch.autograd.grad(value, zero)[0] == 0).all()
    # The limit of adding a constant: no information.
    joint = renyi_kd.renyi_joint_entropy(zero.detach(), other, alpha=alpha)
    expected = renyi_kd.renyi_entropy(other, alpha)
    assert joint.item() == pytest.approx(expected.item(), abs=1e-6)
    for bad in (math.nan, math.inf):
        gram = other.clone()
        gram[3, 5] = bad
        gram.requires_grad_()
        value = renyi_kd.renyi_entropy(gram, alpha)
        assert not value.isfinite()
        assert not torch.autograd.grad(value, gram)[0].isfinite().all()


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("second", [lambda k: k, lambda k: k * k], ids=["twice", "dependent"])
def test_matrices_that_depend_on_each_other(second, alpha):
    """Their gradients are those of the sum, whether a graph of them is made or not."""
    x = torch.randn(513, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.linear_kernel(x).requires_grad_()

    def value(method):
        return renyi_kd.renyi_mutual_information(gram, second(gram), alpha, method=method)

    (expected,) = torch.autograd.grad(value("eigvalsh"), gram)
    for create_graph in (False, True):
        (gradient,) = torch.autograd.grad(value(None), gram, create_graph=create_graph)
        assert (gradient - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("alpha", [2, 3])
def test_second_derivatives_of_large_matrices(alpha):
    """Hessian times a matrix, against a difference of gradients."""
    generator = torch.Generator().manual_seed(0)
    gram = renyi_kd.linear_kernel(torch.randn(520, 9, dtype=torch.float64, generator=generator))
    step = torch.randn(520, 520, dtype=torch.float64, generator=generator) * 1e-4

    def gradient(gram, *, create_graph=False):
        gram = gram.detach().requires_grad_()
        value = renyi_kd.renyi_entropy(gram, alpha)
        return gram, torch.autograd.grad(value, gram, create_graph=create_graph)[0]

    argument, of_value = gradient(gram, create_graph=True)
    (product,) = torch.autograd.grad((of_value * step).sum(), argument)
    expected = (gradient(gram + step)[1] - gradient(gram - step)[1]) / 2
    expected = (expected + expected.mT) / 2
    assert (product - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("n", [4, 520])
def test_transforms_of_functions(alpha, n):
    gram = renyi_kd.rbf_kernel(torch.arange(2.0 * n).view(n, 2) / n).double()
    leaf = gram.clone().requires_grad_()
    (expected,) = torch.autograd.grad(renyi_kd.renyi_entropy(leaf, alpha), leaf)
    for transform in (torch.func.grad, torch.func.jacrev):
        gradient = transform(lambda k: renyi_kd.renyi_entropy(k, alpha))(gram)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("alpha", [3, 5])
def test_autocast_leaves_products_alone(alpha):
    gram = renyi_kd.linear_kernel(torch.randn(600, 20, generator=torch.Generator().manual_seed(0)))
    gram.requires_grad_()
    expected = renyi_kd.renyi_entropy(gram, alpha)
    with torch.autocast("cpu", torch.bfloat16):
        value = renyi_kd.renyi_entropy(gram, alpha)
    assert value == expected
    gradients = [torch.autograd.grad(x, gram)[0] for x in (value, expected)]
    assert torch.equal(*gradients)
