"""Conditional, normalised and dual measures, divergences, HSIC and CKA, bandwidths, labels."""

import math

import numpy as np
import pytest
import reference
import torch
from functionals import samples, tensors
from hypothesis import given
from hypothesis import strategies as st
from strategies import FAMILIES

import renyi_kd
from renyi_kd import SampleGram


def matrices(n, count=3, families=("rbf", "full rank", "narrow rbf")):
    rng = np.random.default_rng(n)
    return [FAMILIES[name](n, rng) for name, _ in zip(families, range(count), strict=False)]


def joint(*grams, alpha):
    return reference.renyi_joint_entropy(*grams, alpha=alpha)


over_alphas = pytest.mark.parametrize("alpha", [0.5, 1, 1.01, 2, 3, math.inf])


@over_alphas
def test_conditional_mutual_information(alpha):
    a, b, c = matrices(9)
    value = renyi_kd.renyi_conditional_mutual_information(*tensors([a, b, c]), alpha)
    expected = (
        joint(a, c, alpha=alpha)
        + joint(b, c, alpha=alpha)
        - joint(c, alpha=alpha)
        - joint(a, b, c, alpha=alpha)
    )
    assert value.item() == pytest.approx(expected, abs=1e-11)


@over_alphas
@pytest.mark.parametrize("normalizer", ["min", "max", "joint"])
def test_normalised_mutual_information(normalizer, alpha):
    a, b, _ = matrices(9)
    value = renyi_kd.renyi_normalized_mutual_information(
        *tensors([a, b]), alpha, normalizer=normalizer
    )
    of_a, of_b, of_both = (joint(*grams, alpha=alpha) for grams in ([a], [b], [a, b]))
    divisor = {"min": min(of_a, of_b), "max": max(of_a, of_b), "joint": of_both}[normalizer]
    assert value.item() == pytest.approx((of_a + of_b - of_both) / divisor, abs=1e-11)


def test_a_constant_variable_shares_nothing():
    gram = renyi_kd.rbf_kernel(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    constant = torch.ones(6, 6, requires_grad=True)
    for normalizer in ("min", "max", "joint"):
        value = renyi_kd.renyi_normalized_mutual_information(gram, constant, normalizer=normalizer)
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(value, constant)[0].isfinite().all()


@pytest.mark.parametrize("alpha", [2, 3])
@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_a_constant_variable_of_many_samples(constant, alpha):
    x = torch.randn(520, 3, generator=torch.Generator().manual_seed(0))
    gram, same = renyi_kd.rbf_kernel(x, bandwidth=1.0), torch.full((520, 520), constant)
    assert renyi_kd.renyi_normalized_mutual_information(same, gram, alpha) == 0


@pytest.mark.parametrize("alpha", [1, 2, 3])
@pytest.mark.parametrize("normalizer", ["min", "max", "joint"])
def test_a_normalised_information_of_what_is_not_finite_is_not(normalizer, alpha):
    gram = torch.eye(6)
    gram[2, 3] = math.inf
    value = renyi_kd.renyi_normalized_mutual_information(
        gram, torch.eye(6), alpha, normalizer=normalizer
    )
    assert not value.isfinite()


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_the_scale_of_matrices_does_not_matter(scale):
    a, b = tensors(matrices(9, 2))
    for of in (renyi_kd.cka, renyi_kd.cauchy_schwarz_divergence):
        torch.testing.assert_close(of(scale * a, scale * b), of(a, b))


@over_alphas
@pytest.mark.parametrize("number", [2, 3, 4])
def test_dual_total_correlation(number, alpha):
    grams = matrices(8, number, ("rbf", "full rank", "narrow rbf", "linear"))
    value = renyi_kd.renyi_dual_total_correlation(*tensors(grams), alpha=alpha)
    everything = joint(*grams, alpha=alpha)
    given_rest = [
        everything - joint(*grams[:i], *grams[i + 1 :], alpha=alpha) for i in range(number)
    ]
    assert value.item() == pytest.approx(everything - sum(given_rest), abs=1e-11)
    if number == 2:
        information = renyi_kd.renyi_mutual_information(*tensors(grams), alpha)
        assert value.item() == pytest.approx(information.item(), abs=1e-11)


@given(
    alpha=st.sampled_from([0.3, 0.7, 0.99, 1]),
    weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    n=st.integers(1, 9),
)
def test_jensen_renyi_divergence(alpha, weights, n):
    grams = matrices(n)
    value = renyi_kd.jensen_renyi_divergence(*tensors(grams), weights=weights, alpha=alpha)
    shares = np.array(weights) / np.sum(weights)
    parts = [reference.trace_one(gram) for gram in grams]
    mixture = sum(share * part for share, part in zip(shares, parts, strict=True))
    expected = reference.renyi_entropy(mixture, alpha) - sum(
        share * reference.renyi_entropy(part, alpha)
        for share, part in zip(shares, parts, strict=True)
    )
    assert value.item() == pytest.approx(expected, abs=1e-9)
    assert -1e-9 <= value.item() <= -(shares * np.log2(shares)).sum() + 1e-9


def test_jensen_renyi_divergence_is_refused_where_it_would_go_negative():
    """At order 2 that of these two is negative, which is why."""
    first, second = np.diag([0.9, 0.1]), np.diag([0.5, 0.5])
    at_order_2 = reference.renyi_entropy(0.9 * first + 0.1 * second, 8) - (
        0.9 * reference.renyi_entropy(first, 8) + 0.1 * reference.renyi_entropy(second, 8)
    )
    assert at_order_2 < 0
    with pytest.raises(ValueError, match=r"`alpha` must be at most 1, got 2.*can be negative"):
        renyi_kd.jensen_renyi_divergence(*tensors([first, second]), alpha=2)


def inner(a, b):
    return np.sum((a + a.T) * (b + b.T)) / 4


def centred(gram):
    h = np.eye(len(gram)) - 1 / len(gram)
    return h @ gram @ h


@pytest.mark.parametrize("n", [2, 9, 40])
def test_divergence_hsic_and_alignment_of_matrices(n):
    a, b = matrices(n, 2)
    a = a + 0.1 * np.random.default_rng(0).normal(size=a.shape)  # not symmetric
    arguments = tensors([a, b])
    symmetric = (a + a.T) / 2
    divergence = -np.log2(inner(a, b) ** 2 / (inner(a, a) * inner(b, b)))
    assert renyi_kd.cauchy_schwarz_divergence(*arguments).item() == pytest.approx(
        divergence, abs=1e-12
    )
    criterion = np.trace(centred(symmetric) @ centred(b)) / (n - 1) ** 2
    assert renyi_kd.hsic(*arguments).item() == pytest.approx(criterion, abs=1e-12)
    k, m = centred(symmetric), centred(b)
    alignment = inner(k, m) / np.sqrt(inner(k, k) * inner(m, m))
    assert renyi_kd.cka(*arguments).item() == pytest.approx(alignment, abs=1e-12)


@pytest.mark.parametrize("name", ["cauchy_schwarz_divergence", "hsic", "cka"])
@pytest.mark.parametrize("dimensions", [(2, 3), (9, 12)])
def test_linear_kernels_need_no_matrix(name, dimensions):
    """By d x d products, and, where these would be larger, by matrices."""
    rng = np.random.default_rng(0)
    x, y = tensors([rng.normal(size=(7, d)) + 1 for d in dimensions], requires_grad=True)
    of = getattr(renyi_kd, name)
    value = of(SampleGram(x), SampleGram(y))
    expected = of(renyi_kd.linear_kernel(x), renyi_kd.linear_kernel(y))
    torch.testing.assert_close(value, expected)
    for gradients in zip(*(torch.autograd.grad(v, [x, y]) for v in (value, expected)), strict=True):
        torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda x, y: of(SampleGram(x), SampleGram(y)), [x, y])


def test_alignment_of_equal_samples_is_zero():
    same = torch.ones(5, 3, requires_grad=True)
    other = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    value = renyi_kd.cka(SampleGram(same), SampleGram(other))
    assert value == 0
    assert torch.autograd.grad(value, same)[0].isfinite().all()


@pytest.mark.parametrize("name", ["cka", "hsic", "cauchy_schwarz_divergence"])
def test_batches_of_alignments(name):
    x = torch.randn(2, 1, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of = getattr(renyi_kd, name)
    value = of(renyi_kd.linear_kernel(x), renyi_kd.linear_kernel(y))
    assert value.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        one = of(renyi_kd.linear_kernel(x[i, 0]), renyi_kd.linear_kernel(y[j]))
        assert value[i, j].item() == pytest.approx(one.item(), abs=1e-13)


BANDWIDTHS = {
    "median_bandwidth": lambda x: reference.median_distance(x, 2),
    "neighbor_bandwidth": lambda x: np.mean(np.sort(reference.distances(x, x, 2))[:, 1:11]),
    "scott_bandwidth": lambda x: (
        np.sqrt(np.mean(np.var(x, axis=0, ddof=1))) * len(x) ** (-1 / (x.shape[1] + 4))
    ),
    "silverman_bandwidth": lambda x: (
        np.sqrt(np.mean(np.var(x, axis=0, ddof=1)))
        * (len(x) * (x.shape[1] + 2) / 4) ** (-1 / (x.shape[1] + 4))
    ),
}


@pytest.mark.parametrize("name", BANDWIDTHS)
@pytest.mark.parametrize("d", [1, 3])
def test_bandwidths(name, d):
    scale = np.arange(1, 7).reshape(2, 3, 1, 1)
    x = np.random.default_rng(0).normal(size=(2, 3, 15, d)) * scale
    (argument,) = tensors([x], requires_grad=True)
    value = getattr(renyi_kd, name)(argument)
    assert value.shape == (2, 3, 1, 1)
    assert not value.requires_grad
    expected = [[BANDWIDTHS[name](z) for z in row] for row in x]
    np.testing.assert_allclose(value[..., 0, 0].numpy(), expected, rtol=1e-12)
    gram = renyi_kd.rbf_kernel(argument, bandwidth=value)  # serves as it is
    np.testing.assert_allclose(
        gram[1, 2].detach().numpy(), reference.rbf_kernel(x[1, 2], bandwidth=expected[1][2])
    )


def test_bandwidths_of_half_precision_are_those_of_float32():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in BANDWIDTHS:
        of = getattr(renyi_kd, name)
        assert of(x).dtype == torch.float32
        torch.testing.assert_close(of(x), of(x.float()))


def test_the_bandwidth_of_a_dimension():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.rbf_kernel(x, bandwidth=renyi_kd.dimension_bandwidth(x))
    torch.testing.assert_close(gram, (-torch.cdist(x, x).square() / 7).exp())


@pytest.mark.parametrize("convert", [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.byte])
def test_labels(convert):
    labels = convert(torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]))
    gram = renyi_kd.label_kernel(labels)
    one_hot = torch.nn.functional.one_hot(labels.long()).float()
    torch.testing.assert_close(gram, renyi_kd.linear_kernel(one_hot))
    torch.testing.assert_close(renyi_kd.label_kernel(labels, labels[:, :2]), gram[..., :2])
    counts = np.bincount(labels[0].long().numpy())
    expected = reference.entropy_of_spectrum(counts / 5, 1)
    assert renyi_kd.renyi_entropy(gram[0], 1).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: renyi_kd.label_kernel(g), TypeError, "`labels` must be.*integers.*float32"),
        (lambda g: renyi_kd.label_kernel([0, 1]), TypeError, "`labels`.*list"),
        (lambda g: renyi_kd.label_kernel(g[0, 0].long()), ValueError, r"`labels`.*got \(\)"),
        (lambda g: renyi_kd.neighbor_bandwidth(g), ValueError, "`neighbors` must be below.*4"),
        (lambda g: renyi_kd.neighbor_bandwidth(g, 0), ValueError, "`neighbors`"),
        (lambda g: renyi_kd.neighbor_bandwidth(g, 1.5), TypeError, "`neighbors`"),
        (lambda g: renyi_kd.scott_bandwidth(g[:1]), ValueError, "two samples"),
        (lambda g: renyi_kd.silverman_bandwidth(g.long()), TypeError, "`x`"),
        (lambda g: renyi_kd.hsic(g[:1, :1], g[:1, :1]), ValueError, "two samples"),
        (lambda g: renyi_kd.cka(g, g[:3, :3]), ValueError, "same n samples"),
        (lambda g: renyi_kd.cauchy_schwarz_divergence(g, None), TypeError, "`gram_y`"),
        (lambda g: renyi_kd.renyi_dual_total_correlation(g), ValueError, "at least two"),
        (lambda g: renyi_kd.jensen_renyi_divergence(g), ValueError, "at least two"),
        (
            lambda g: renyi_kd.jensen_renyi_divergence(g, g, weights=[1]),
            ValueError,
            "`weights` must be 2 numbers",
        ),
        (
            lambda g: renyi_kd.jensen_renyi_divergence(g, g, weights=[1, -1]),
            ValueError,
            r"`weights\[1\]`",
        ),
        (
            lambda g: renyi_kd.jensen_renyi_divergence(g, g, weights=[0, 0]),
            ValueError,
            "not all zero",
        ),
        (
            lambda g: renyi_kd.jensen_renyi_divergence(g, g, weights={1: 2}),
            TypeError,
            "`weights` must be a sequence.*dict",
        ),
        (lambda g: renyi_kd.scott_bandwidth(g[0]), ValueError, "one sample a row"),
        (lambda g: renyi_kd.silverman_bandwidth([1.0]), TypeError, "`x`"),
        (
            lambda g: renyi_kd.renyi_normalized_mutual_information(g, g, normalizer="mean"),
            ValueError,
            "`normalizer` must be one of 'min', 'max', 'joint'",
        ),
        (
            lambda g: renyi_kd.renyi_conditional_mutual_information(g, g, given=g[:3, :3]),
            ValueError,
            "same n samples",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.eye(4))


def test_functionals_of_samples_are_those_of_matrices():
    grams = [SampleGram(x, renyi_kd.rbf_kernel, bandwidth=2.0) for x in tensors(samples(9, 3))]
    for name in ("renyi_conditional_mutual_information", "renyi_dual_total_correlation"):
        of = getattr(renyi_kd, name)
        torch.testing.assert_close(of(*grams), of(*(gram.matrix() for gram in grams)))
