"""Entropies by estimate: near the exact ones, with honest errors."""

import math

import numpy as np
import pytest
import reference
import torch
from functionals import samples, tensors
from grids import over, small_tiles
from strategies import FAMILIES, gram_with_spectrum

import renyi_kd
from renyi_kd import SampleGram, renyi_entropy_estimate


def seeded(seed=1, device=None):
    return torch.Generator(device or torch.get_default_device()).manual_seed(seed)


def spectra(n):
    k = np.arange(1, n + 1)
    rng = np.random.default_rng(0)
    return {
        "flat": np.ones(n),
        "uniform": rng.uniform(0.5, 1.5, n),
        "k^-0.5": k**-0.5,
        "k^-1": 1 / k,
        "k^-2": 1.0 / k**2,
        "exponential": np.exp(-k / 30),
        "low rank": (k <= 20) * 1.0,
        "spike": np.r_[9.0, np.full(n - 1, 1 / n)],
        "one spike": np.r_[1.0, np.full(n - 1, 1e-6 / n)],
        "spike and decay": np.r_[9.0, 1 / k[1:]],
        "rank one": np.eye(n)[0],
    }


@over("options", [{}], slow=[{"rank": 8, "probes": 8}], ids=["default", "few vectors"])
@over("alpha", [1.5, 2.5], slow=[2, 3.5, 6])
@over(
    "spectrum",
    ["k^-1", "spike and decay", "rank one"],
    slow=["flat", "uniform", "k^-0.5", "k^-2", "exponential", "low rank", "spike", "one spike"],
)
def test_error_estimates_are_honest(spectrum, alpha, options):
    """The true error is within three times the estimate in 190 of 200 draws."""
    gram = gram_with_spectrum(spectra(256)[spectrum], np.random.default_rng(0))
    expected = reference.renyi_entropy(gram, alpha)
    # One batch of 200: each matrix has random vectors of its own.
    batch = torch.tensor(gram).float().expand(200, -1, -1)
    value, error = renyi_entropy_estimate(batch, alpha=alpha, **options, generator=seeded())
    assert ((value.double() - expected).abs() <= 3 * error).sum() >= 190
    assert error.max() < 1  # not by claiming nothing


def test_errors_shrink_when_few_directions_are_left():
    """The probes are orthogonal: 35 of the 36 that the rank leaves are nearly all of them."""
    gram = gram_with_spectrum(spectra(40)["uniform"], np.random.default_rng(0))
    expected = reference.renyi_entropy(gram, 1.5)
    batch = torch.tensor(gram).expand(200, -1, -1)
    options = {"alpha": 1.5, "rank": 4, "probes": 35}
    value, error = renyi_entropy_estimate(batch, **options, generator=seeded())
    deviation = (value - expected).square().mean().sqrt()
    assert 0.15 < deviation / error.square().mean().sqrt() < 1.5


@pytest.mark.parametrize(("alpha", "within"), [(1.5, 5e-3), (2, 1e-5), (2.5, 1e-3), (3.5, 1e-3)])
@over("d", [16], slow=[2, 64])
def test_estimates_of_rbf_kernels(d, alpha, within):
    x = torch.randn(1024, d, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.rbf_kernel(x)
    expected = renyi_kd.renyi_entropy(gram.double(), alpha, method="eigvalsh")
    for argument in (gram, SampleGram(x, renyi_kd.rbf_kernel)):
        value, _ = renyi_entropy_estimate(argument, alpha=alpha, generator=seeded())
        assert value.item() == pytest.approx(expected.item(), abs=within)


@pytest.mark.parametrize("alpha", [2, 2.5])
@pytest.mark.parametrize("variables", [1, 3])
def test_joints(variables, alpha):
    """Of matrices, of samples, and of both."""
    x = tensors(samples(300, 2, variables))
    kernel = renyi_kd.rbf_kernel
    grams = [kernel(z, bandwidth=1.0) for z in x]
    sampled = [SampleGram(z, kernel, bandwidth=1.0) for z in x]
    expected = renyi_kd.renyi_joint_entropy(*grams, alpha=alpha)
    for arguments in (grams, sampled, [sampled[0], *grams[1:]]):
        value, error = renyi_entropy_estimate(*arguments, alpha=alpha, generator=seeded())
        assert (value - expected).abs() <= 3 * error
        assert error < 0.02


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    gram = renyi_kd.linear_kernel(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)))
    value, scaled = (
        renyi_entropy_estimate(factor * gram, alpha=2.5, generator=seeded()).bits
        for factor in (1, scale)
    )
    assert scaled.item() == pytest.approx(value.item(), abs=1e-5)


def test_a_seed_repeats_an_estimate():
    gram = torch.tensor(FAMILIES["full rank"](200, np.random.default_rng(0)))
    first, again, other = (
        renyi_entropy_estimate(gram, alpha=2.5, generator=seeded(seed)).bits for seed in (0, 0, 1)
    )
    assert first == again != other
    torch.manual_seed(0)
    default = renyi_entropy_estimate(gram, alpha=2.5).bits
    torch.manual_seed(0)
    assert renyi_entropy_estimate(gram, alpha=2.5).bits == default


@pytest.mark.parametrize(
    ("alpha", "within"), [(1.5, 0.01), (2, 1e-6), (2.5, 1e-3), (3.5, 1e-3), (5, 1e-3)]
)
def test_gradients(alpha, within):
    """That of a matrix, and that of samples, against the exact one of eigenvalues."""
    (x,) = tensors(samples(400, 2, 1), requires_grad=True)
    gram = renyi_kd.rbf_kernel(x, bandwidth=1.5)
    exact = renyi_kd.renyi_entropy(gram, alpha, method="eigvalsh")
    sampled = SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.5)
    for argument, variable in ((gram, gram), (gram, x), (sampled, x)):
        value = renyi_entropy_estimate(argument, alpha=alpha, generator=seeded()).bits
        (gradient,) = torch.autograd.grad(value, variable, retain_graph=True)
        (expected,) = torch.autograd.grad(exact, variable, retain_graph=True)
        assert (gradient - expected).norm() < within * expected.norm()


def test_gradient_of_a_joint_of_samples():
    x, y = tensors(samples(300, 2, 2), requires_grad=True)
    kernel = renyi_kd.rbf_kernel
    grams = [kernel(z, bandwidth=1.5) for z in (x, y)]
    sampled = [SampleGram(z, kernel, bandwidth=1.5) for z in (x, y)]
    expected = renyi_kd.renyi_joint_entropy(*grams, alpha=2.5)
    value = renyi_entropy_estimate(*sampled, alpha=2.5, rank=48, generator=seeded()).bits
    gradients = (torch.autograd.grad(z, (x, y)) for z in (expected, value))
    for exact, estimate in zip(*gradients, strict=True):
        assert (estimate - exact).norm() < 0.01 * exact.norm()


@small_tiles
def test_an_estimate_has_no_second_derivative():
    (x,) = tensors(samples(100, 2, 1), requires_grad=True)
    for gram in (renyi_kd.rbf_kernel(x, bandwidth=1), SampleGram(x, renyi_kd.rbf_kernel)):
        estimate = renyi_entropy_estimate(gram, alpha=3)
        assert not estimate.error.requires_grad
        (gradient,) = torch.autograd.grad(estimate.bits, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no derivative. Give the Gram matrix itself"):
            torch.autograd.grad(gradient.sum(), x)


def test_autocast_changes_nothing():
    gram = renyi_kd.rbf_kernel(torch.randn(200, 3, generator=torch.Generator().manual_seed(0)))
    gram.requires_grad_()
    values, gradients = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(renyi_entropy_estimate(gram, alpha=2.5, generator=seeded()).bits)
            gradients.append(torch.autograd.grad(values[-1], gram)[0])
    assert torch.equal(*values)
    assert torch.equal(*gradients)


def test_zeros_and_nan():
    zero = torch.zeros(100, 100, requires_grad=True)
    value, error = renyi_entropy_estimate(zero, alpha=3)
    assert (value, error) == (0, 0)
    assert (torch.autograd.grad(value, zero)[0] == 0).all()
    for bad in (math.nan, math.inf):
        gram = torch.eye(100)
        gram[3, 5] = gram[5, 3] = bad
        gram.requires_grad_()
        value = renyi_entropy_estimate(gram, alpha=3).bits
        assert not value.isfinite()
        assert not torch.autograd.grad(value, gram)[0].isfinite().all()


GRAM = torch.eye(100)


@pytest.mark.parametrize(
    ("grams", "options", "error", "message"),
    [
        ([GRAM], {"alpha": 1.4}, ValueError, r"finite and >= 1.5, got 1.4.*renyi_joint_entropy"),
        ([GRAM], {"alpha": math.inf}, ValueError, "must be finite"),
        ([GRAM], {"alpha": "2"}, TypeError, "`alpha` must be a real number"),
        (
            [GRAM[:20, :20]],
            {"alpha": 3},
            ValueError,
            r"needs n > rank \+ probes, got n = 20 and 16",
        ),
        ([GRAM], {"rank": 0}, ValueError, "`rank` must be an integer >= 1"),
        ([GRAM], {"rank": 2.5}, TypeError, "`rank` must be an integer"),
        ([GRAM], {"probes": 1}, ValueError, "`probes` must be an integer >= 2"),
        ([GRAM], {"generator": 3}, TypeError, "`generator` must be a torch.Generator"),
        ([GRAM], {"progress": True}, TypeError, "`progress` must be callable"),
        ([], {}, ValueError, "`grams` must hold at least one"),
        ([GRAM, GRAM[:50, :50]], {}, ValueError, "over the same n samples"),
        ([GRAM.long()], {}, TypeError, "`grams` must have a floating-point dtype"),
    ],
)
def test_bad_input(grams, options, error, message):
    with pytest.raises(error, match=message):
        renyi_entropy_estimate(*grams, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alpha", [1.5, 3.5])
def test_on_cuda(alpha):
    x = torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)).cuda()
    expected = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x), alpha)
    for gram in (renyi_kd.rbf_kernel(x), SampleGram(x, renyi_kd.rbf_kernel)):
        value, error = renyi_entropy_estimate(gram, alpha=alpha, generator=seeded(device="cuda"))
        assert (value - expected).abs() <= 3 * error + 1e-6
