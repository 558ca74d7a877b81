"""Linear kernels with fewer dimensions than samples."""

import numpy as np
import pytest
import reference
import torch
from functionals import over_few_functionals, samples, tensors
from grids import over

import renyi_kd
from renyi_kd import SampleGram


@over_few_functionals
@over("alpha", [0.5, 1, 2, 3], slow=[0.3, 1.5])
def test_gradient_of_the_dual(functional, alpha):
    x = tensors(samples(9, 2), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: functional(renyi_kd, *map(SampleGram, x), alpha=alpha), x, atol=1e-7, rtol=1e-6
    )


def test_samples_of_low_rank():
    """Fewer dimensions than they have; rounding counts as none of them, at any order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 30))
    for alpha in (0.1, 0.5, 1, 2):
        expected = reference.renyi_entropy(reference.linear_kernel(x), alpha)
        value = renyi_kd.renyi_entropy(SampleGram(torch.tensor(x)), alpha)
        assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_near_duplicate_samples_keep_digits(spread):
    """1 - |A|^2 as the sum of 1 - cos^2 of pairs, from the differences of float32 samples."""
    x = 1 + spread * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    exact = x.to(torch.float64).numpy().astype(np.longdouble)
    norms = (exact**2).sum(1)
    difference = exact[:, None] - exact[None]
    inner, square = (difference * exact[:, None]).sum(-1), (difference**2).sum(-1)
    # |x|^2 |y|^2 - (x.y)^2 = |x|^2 |d|^2 - (x.d)^2, d = x - y
    minors = norms[:, None] * square - inner**2
    expected = -np.log1p(-(minors.sum() / norms.sum() ** 2)) / np.log(2)
    value = renyi_kd.renyi_entropy(SampleGram(x), 2)
    assert value.item() == pytest.approx(float(expected), rel=1e-5)
