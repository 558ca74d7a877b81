"""Gram matrices given by their samples: values on every route, and what cannot be served."""

import math

import numpy as np
import pytest
import reference
import torch
from functionals import SAMPLE_KERNELS, over_few_functionals, samples, tensors
from grids import over, over_cases
from hypothesis import given
from hypothesis import strategies as st

import renyi_kd
from renyi_kd import SampleGram

over_kernels = over_cases("kernel", SAMPLE_KERNELS, fast=SAMPLE_KERNELS)


@over_few_functionals
@over_kernels
@over("alpha", [0.5, 1, 2, 3], slow=[1.01, 1.5, 5, math.inf])
@pytest.mark.parametrize(("n", "d"), [(40, 3), (40, 7), (9, 12)])
def test_samples(functional, kernel, alpha, n, d):
    """Two dimensions of product 9 and 49: below and above n, and one above n itself."""
    of, options, of_reference = kernel
    x = samples(n, d)
    value = functional(renyi_kd, *[SampleGram(z, of, **options) for z in tensors(x)], alpha=alpha)
    expected = functional(reference, *[of_reference(z, **options) for z in x], alpha=alpha)
    assert value.item() == pytest.approx(expected, abs=1e-9)


@over_kernels
def test_batches_and_mixtures_of_samples_and_matrices(kernel):
    of, options, _ = kernel
    x = torch.randn(2, 1, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for alpha in (1, 2, 3):
        by_samples, mixed, by_matrices = (
            renyi_kd.renyi_mutual_information(a, b, alpha)
            for a, b in [
                (SampleGram(x, of, **options), SampleGram(y, of, **options)),
                (SampleGram(x, of, **options), of(y, **options)),
                (of(x, **options), of(y, **options)),
            ]
        )
        assert by_samples.shape == (2, 3)
        torch.testing.assert_close(by_samples, by_matrices, rtol=0, atol=1e-11)
        torch.testing.assert_close(mixed, by_matrices, rtol=0, atol=1e-11)


def test_a_kernel_of_ones_own():
    def cauchy_kernel(x, y, *, width):
        return 1 / (1 + (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) / width**2)

    (x,) = tensors(samples(600, 2, 1), requires_grad=True)
    matrix = cauchy_kernel(x, x, width=2.0)
    for alpha in (1.5, 2):
        gram = SampleGram(x, lambda x, y=None: cauchy_kernel(x, x if y is None else y, width=2.0))
        value = renyi_kd.renyi_entropy(gram, alpha)
        expected = renyi_kd.renyi_entropy(matrix, alpha, method="eigvalsh")
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            *[torch.autograd.grad(y, x, retain_graph=True)[0] for y in (value, expected)]
        )


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 1.5, 2, 3])
def test_float32_samples_are_taken_as_they_are(alpha):
    """The definition on the rounded samples in float64; at order 0.1 rounding still counts."""
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    expected = reference.renyi_entropy(reference.linear_kernel(x.double().numpy()), alpha)
    value = renyi_kd.renyi_entropy(SampleGram(x), alpha)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_rounding_below_order_one():
    """Of half-precision samples it is float32's; of a matrix among samples it is the matrix's."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(600, 1, generator=generator), torch.randn(600, 8, generator=generator)
    x = (common + 1e-2 * own).bfloat16()
    values = [renyi_kd.renyi_entropy(SampleGram(z), 0.3).item() for z in (x, x.float())]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    x, y = torch.randn(2, 300, 4, generator=generator)
    matrix, other = renyi_kd.linear_kernel(x), renyi_kd.linear_kernel(y)
    mixed = renyi_kd.renyi_joint_entropy(matrix, SampleGram(y), alpha=0.3)
    expected = renyi_kd.renyi_joint_entropy(matrix, other, alpha=0.3)
    assert mixed.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("d", [3, 700])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_samples_does_not_matter(d, scale):
    x = torch.randn(600, d, generator=torch.Generator().manual_seed(0))
    for alpha in (2, 3):
        value, expected = (
            renyi_kd.renyi_joint_entropy(*[SampleGram(z)] * 3, alpha=alpha) for z in (x * scale, x)
        )
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("d", [3, 700])
@pytest.mark.parametrize("other", ["linear", "rbf"])
def test_a_variable_of_zeros_carries_no_information(other, d, alpha):
    """By the dual, tile by tile, and as a matrix."""
    of, options, _ = SAMPLE_KERNELS[other]
    zero = torch.zeros(600, d, requires_grad=True)
    y = SampleGram(torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), of, **options)
    value = renyi_kd.renyi_mutual_information(SampleGram(zero), y, alpha)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert (torch.autograd.grad(value, zero)[0] == 0).all()


@pytest.mark.parametrize("bandwidth", [1e-9, 1e-7, 1e-2, 1e9])
@pytest.mark.parametrize("kernel", [renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel])
def test_samples_far_apart_keep_their_distances(kernel, bandwidth):
    """Clusters a million apart, samples within them a hundredth."""
    rng = np.random.default_rng(0)
    x = np.repeat(1e6 * rng.normal(size=(6, 3)), 100, axis=0) + 1e-2 * rng.normal(size=(600, 3))
    x = torch.tensor(x)
    value = renyi_kd.renyi_entropy(SampleGram(x, kernel, bandwidth=bandwidth))
    expected = renyi_kd.renyi_entropy(kernel(x, bandwidth=bandwidth), method="eigvalsh")
    assert value.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_an_outlier_does_not_hide_the_others():
    x = torch.randn(600, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 1e20
    for kernel in (renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel):
        value = renyi_kd.renyi_entropy(SampleGram(x, kernel))
        expected = renyi_kd.renyi_entropy(kernel(x), method="eigvalsh")
        assert value.item() == pytest.approx(expected.item(), abs=1e-9)


@given(
    n=st.integers(2, 12),
    d=st.integers(1, 12),
    copies=st.integers(1, 3),
    alpha=st.sampled_from([0.5, 1, 1.5, 2, 3, math.inf]),
    kernel=st.sampled_from(sorted(SAMPLE_KERNELS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_copies_order_and_orientation_of_samples_change_nothing(n, d, copies, alpha, kernel, seed):
    of, options, of_reference = SAMPLE_KERNELS[kernel]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    expected = reference.renyi_entropy(of_reference(x, **options), alpha)
    if options or kernel == "linear":  # the median depends on copies
        x = np.repeat(x, copies, axis=0)
    if not kernel.startswith("laplacian"):  # of the L1 distance
        x = x @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = torch.tensor(rng.permutation(x))
    value = renyi_kd.renyi_entropy(SampleGram(x, of, **options), alpha)
    assert value.item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_samples_compile(alpha):
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def value(x):
        return renyi_kd.renyi_entropy(SampleGram(x), alpha)

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, value(x))
    gradients = [torch.autograd.grad(y, x)[0] for y in (compiled, value(x))]
    torch.testing.assert_close(*gradients)


X = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
GRAM = torch.eye(100)
LINEAR, RBF = renyi_kd.linear_kernel, renyi_kd.rbf_kernel


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SampleGram(X.long()), TypeError, "`x` must have a floating-point dtype"),
        (lambda: SampleGram(X[0]), ValueError, "one sample a row"),
        (lambda: SampleGram(X, "rbf"), TypeError, "`kernel` must be callable, got str"),
        (lambda: SampleGram(X, RBF, bandwidth=0), ValueError, "`bandwidth` must be a number > 0"),
        (lambda: SampleGram(X, RBF, width=1), TypeError, "width"),
        (lambda: SampleGram(X, renyi_kd.polynomial_kernel), TypeError, "degree"),
        (
            lambda: SampleGram(X, lambda x, y: x),
            ValueError,
            r"of two single ones \(1, 1\), got \(1, 3\)",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(torch.zeros(8193, 1), RBF)),
            ValueError,
            "`bandwidth` must be given for more than 8192 samples, got 8193",
        ),
        (
            lambda: renyi_kd.renyi_joint_entropy(SampleGram(X), GRAM),
            ValueError,
            "over the same n samples",
        ),
        (lambda: renyi_kd.renyi_entropy(GRAM, progress=True), TypeError, "`progress` must be call"),
        (
            lambda: SampleGram(X, lambda x, y: x @ y.mT * torch.ones((), requires_grad=True)),
            ValueError,
            "`kernel` must not train parameters of its own",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(X), 2.5, method="frobenius"),
            ValueError,
            "'frobenius' needs alpha = 2",
        ),
        (
            lambda: renyi_kd.renyi_entropy(SampleGram(X), 2.5, method="power"),
            ValueError,
            "'power' needs an integer alpha",
        ),
    ],
)
def test_what_cannot_be_served(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr():
    gram = SampleGram(torch.ones(3, 2), RBF, bandwidth=0.5)
    assert repr(gram) == ("SampleGram(<torch.float32 of shape (3, 2)>, rbf_kernel, bandwidth=0.5)")


NOT_OF_TWO_SAMPLES = {
    "normalised": lambda a, b=None: renyi_kd.normalize_gram(
        renyi_kd.polynomial_kernel(a, b, degree=2)
    ),
    "of a median": lambda a, b=None: renyi_kd.rbf_kernel(a, b),
    "divided by its sum": lambda a, b=None: renyi_kd.linear_kernel(a, b).softmax(dim=-1),
    "centred": lambda a, b=None: renyi_kd.linear_kernel(a - a.mean(dim=-2, keepdim=True)),
}


@pytest.mark.parametrize("kernel", NOT_OF_TWO_SAMPLES)
def test_kernels_whose_entries_change_with_other_samples_are_refused(kernel):
    for x in (X, torch.cat([torch.zeros(2, 3), X])):
        with pytest.raises(ValueError, match=r"own two samples alone.*normalize=True"):
            SampleGram(x, NOT_OF_TWO_SAMPLES[kernel])


@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("alpha", [0.5, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (renyi_kd.linear_kernel, {}),
        (renyi_kd.polynomial_kernel, {"degree": 2}),
        (renyi_kd.rbf_kernel, {"bandwidth": 1.0}),
        (lambda a, b=None: renyi_kd.polynomial_kernel(a, b, degree=3), {}),
    ],
    ids=["linear", "polynomial", "rbf", "own"],
)
def test_normalised_samples(kernel, options, alpha, n):
    """Def. 1, two zero samples included."""
    x = X[:n].double()
    x[[3, 5]] = 0
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    of_samples = SampleGram(leaves[0], kernel, normalize=True, **options)
    value = renyi_kd.renyi_entropy(of_samples, alpha)
    expected = renyi_kd.renyi_entropy(renyi_kd.normalize_gram(kernel(leaves[1], **options)), alpha)
    assert value.item() == pytest.approx(expected.item(), abs=1e-9)
    kept = [k for k in range(n) if k not in (3, 5)]
    pairs = zip((value, expected), leaves, strict=True)
    gradients = [torch.autograd.grad(*pair)[0][kept] for pair in pairs]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3, 5])
@pytest.mark.parametrize("kernel", SAMPLE_KERNELS)
def test_routes_on_cuda(kernel, alpha):
    """Samples and matrices, above the sizes of a tile on a GPU at order two."""
    of, options, _ = SAMPLE_KERNELS[kernel]
    n = 5000 if alpha == 2 else 600
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        values = [
            renyi_kd.renyi_entropy(SampleGram(leaf, of, **options), alpha),
            renyi_kd.renyi_entropy(of(leaf, **options), alpha),
        ]
        gradients = [torch.autograd.grad(value, leaf)[0] for value in values]
        found.append([z.detach().cpu() for z in (*values, *gradients)])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)
