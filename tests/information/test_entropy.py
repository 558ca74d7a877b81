"""Values and gradients of the information functionals, on every route, against the reference."""

import math

import numpy as np
import pytest
import reference
import torch
from functionals import (
    ALPHAS,
    DRAWS,
    ROUTES,
    deviation,
    draws,
    over_few_functionals,
    over_few_routes,
    over_functionals,
    over_routes,
    routes,
    tensors,
)
from grids import over, over_cases
from strategies import FAMILIES, SPECTRA, gram_with_spectrum, label_kernel

import renyi_kd

KERNELS = {
    "linear": renyi_kd.linear_kernel,
    "cosine": lambda x: renyi_kd.normalize_gram(renyi_kd.linear_kernel(x)),
    "polynomial": lambda x: renyi_kd.polynomial_kernel(x, degree=3, offset=0.5),
    "rbf": lambda x: renyi_kd.rbf_kernel(x, bandwidth=1.5),
    "laplacian": lambda x: renyi_kd.laplacian_kernel(x, bandwidth=2.5),
}


@over_functionals
@over_routes
def test_value(functional, alpha, method):
    """Of both dtypes, from matrices of one to seven samples of every family."""
    few = [grams for grams in DRAWS if len(grams[0]) <= 7]
    assert deviation(functional, alpha, method, torch.float64, few) < 1e-9
    if alpha >= 1:  # below order one, rounding a singular matrix changes its entropy
        assert deviation(functional, alpha, method, torch.float32, few) < 1e-5


@pytest.mark.slow
@over_functionals
@pytest.mark.parametrize(("alpha", "method"), ROUTES)
def test_value_of_more_samples(functional, alpha, method):
    assert deviation(functional, alpha, method, torch.float64) < 1e-9
    if alpha >= 1:
        assert deviation(functional, alpha, method, torch.float32) < 1e-5


@over_few_functionals
@pytest.mark.parametrize("alpha", [*ALPHAS, 2.0, np.int64(3), np.float32(1.5), np.float64(2)])
def test_default_method_is_the_cheapest_that_serves(functional, alpha):
    a, b, c = tensors(draws(7)[-1])
    (_, cheapest), *_ = routes(float(alpha))
    value = functional(renyi_kd, a, b, c, alpha=alpha)
    expected = functional(renyi_kd, a, b, c, alpha=float(alpha), method=cheapest)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@over_routes
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_value_from_known_spectrum(spectrum, alpha, method):
    rng = np.random.default_rng(0)
    p = spectrum(24, rng)
    gram = torch.tensor(gram_with_spectrum(p, rng))
    expected = reference.entropy_of_spectrum(p, alpha)
    for dtype, within in [(torch.float64, 1e-9), (torch.float32, 1e-5)]:
        value = renyi_kd.renyi_entropy(gram.to(dtype), alpha, method=method)
        assert value.item() == pytest.approx(expected, abs=within)


@pytest.mark.parametrize("alpha", [1, 1.01, 1.5, 2, 3, 10, math.inf])
def test_spectrum_that_decays_through_rounding(alpha):
    grams = [
        reference.rbf_kernel(np.random.default_rng(seed).normal(size=(48, 2)), bandwidth=2.0)
        for seed in range(2)
    ]
    value = renyi_kd.renyi_mutual_information(*tensors(grams), alpha)
    assert value.item() == pytest.approx(
        reference.renyi_mutual_information(*grams, alpha), abs=1e-9
    )


@pytest.mark.parametrize("alpha", [0.01, 32, 33, 1000, 1e6])
def test_extreme_orders(alpha):
    """p^alpha underflows here unless the largest eigenvalue is taken out."""
    p = SPECTRA["full rank"](64, np.random.default_rng(0))
    gram = torch.tensor(gram_with_spectrum(p, np.random.default_rng(1)))
    expected = reference.entropy_of_spectrum(p, alpha)
    for _, method in routes(alpha):
        value = renyi_kd.renyi_entropy(gram, alpha, method=method)
        assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1e-5, -1e-5, 1e-7, -1e-9, 1e-12, -1e-15])
def test_continuity_at_order_one(offset, dtype):
    """S_alpha = S_1 - (alpha - 1) (ln 2 / 2) Var(log2 p) to second order."""
    p = SPECTRA["decaying"](16, np.random.default_rng(0))
    gram = torch.tensor(gram_with_spectrum(p, np.random.default_rng(1)), dtype=dtype)
    shannon = -np.sum(p * np.log2(p))
    slope = -math.log(2) / 2 * np.sum(p * (np.log2(p) + shannon) ** 2)
    value = renyi_kd.renyi_entropy(gram, 1 + offset)
    within = {torch.float64: 1e-9, torch.float32: 1e-6}[dtype]
    assert value.item() == pytest.approx(shannon + offset * slope, abs=within)


@over_few_functionals
@over_few_routes
def test_batch_equals_loop(functional, alpha, method):
    grams = [np.stack(of_families) for of_families in zip(*draws(6), strict=True)]
    grams = [g[:16].reshape(2, 8, 6, 6) for g in tensors(grams)]
    batched = functional(renyi_kd, *grams, alpha=alpha, method=method)
    assert batched.shape == (2, 8)
    for i, j in np.ndindex(2, 8):
        alone = functional(renyi_kd, *[g[i, j] for g in grams], alpha=alpha, method=method)
        assert batched[i, j].item() == pytest.approx(alone.item(), abs=1e-12)


@over_few_functionals
@over_few_routes
def test_scale_of_each_argument_does_not_matter(functional, alpha, method):
    a, b, c = tensors(draws(7)[-1])
    value = functional(renyi_kd, a, b, c, alpha=alpha, method=method)
    scaled = functional(renyi_kd, 1e6 * a, 1e-6 * b, 3 * c, alpha=alpha, method=method)
    assert scaled.item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("n", [20, 200, 520])
@pytest.mark.parametrize("alpha", [2, 3, 8])
def test_float32_is_served_to_the_ends_of_its_range(n, alpha):
    """The trace may leave it, as long as twice each entry does not."""
    x = torch.tensor(np.random.default_rng(n).normal(size=(n, 3)))
    gram = renyi_kd.rbf_kernel(x, bandwidth=1.0).float()
    expected = renyi_kd.renyi_entropy(gram, alpha).item()
    for factor in (1.6e38, 1e-33):
        scaled = (factor * gram).requires_grad_()
        value = renyi_kd.renyi_entropy(scaled, alpha)
        value.backward()
        assert value.item() == pytest.approx(expected, abs=1e-6)
        assert scaled.grad.isfinite().all()


@over_few_functionals
@pytest.mark.parametrize("alpha", [0.5, 1, 2, 3.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_the_value_of_the_matrix_upcast(functional, alpha, dtype):
    grams = tensors(draws(6)[-1], dtype)
    value = functional(renyi_kd, *grams, alpha=alpha)
    assert value.dtype == torch.float32
    assert torch.equal(value, functional(renyi_kd, *[g.float() for g in grams], alpha=alpha))


@over_functionals
def test_dtypes(functional):
    grams = draws(6)[-1]
    assert functional(renyi_kd, *tensors(grams, torch.float32)).dtype == torch.float32
    assert functional(renyi_kd, *tensors(grams, torch.float64)).dtype == torch.float64
    with pytest.raises((TypeError, ValueError), match=r"dtype|floating"):
        functional(renyi_kd, *[torch.ones(4, 4, dtype=torch.int64)] * 3)


@over_functionals
def test_autocast_changes_nothing(functional):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for kernel in (renyi_kd.linear_kernel, renyi_kd.rbf_kernel):
        value = functional(renyi_kd, kernel(x), kernel(2 - x), kernel(x**2))
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = functional(renyi_kd, kernel(x), kernel(2 - x), kernel(x**2))
        assert torch.equal(under_autocast, value)


@over_few_functionals
@over_few_routes
def test_zero_matrix_has_entropy_zero(functional, alpha, method):
    gram = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    value = functional(renyi_kd, gram, gram, gram, alpha=alpha, method=method)
    (gradient,) = torch.autograd.grad(value, gram)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.isfinite().all()


@over_few_functionals
@over_few_routes
def test_zero_matrix_counts_as_a_constant_variable(functional, alpha, method):
    a, _, c = draws(6)[-1]
    grams = tensors([a, np.zeros((6, 6)), c])
    value = functional(renyi_kd, *grams, alpha=alpha, method=method)
    expected = functional(reference, a, np.ones((6, 6)), c, alpha=alpha)
    assert value.item() == pytest.approx(expected, abs=1e-9)


@over_few_functionals
@over_few_routes
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_input_spoils_only_its_own_matrix(functional, alpha, method, poison):
    batch = torch.stack([torch.eye(3), torch.eye(3)]).double()
    batch[0, 0, 1] = poison
    batch.requires_grad_()
    value = functional(renyi_kd, batch, batch, batch, alpha=alpha, method=method)
    (gradient,) = torch.autograd.grad(value.sum(), batch)
    assert not value[0].isfinite()
    assert gradient[0].isnan().any()
    assert value[1].isfinite()
    assert gradient[1].isfinite().all()


@over_routes
@pytest.mark.parametrize("diagonal", [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0)])
def test_nan_off_the_diagonal_stays(alpha, method, diagonal):
    gram = torch.tensor([[diagonal[0], math.nan], [math.nan, diagonal[1]]])
    assert renyi_kd.normalize_gram(gram)[0, 1].isnan()
    assert renyi_kd.renyi_entropy(gram, alpha, method=method).isnan()


# Gradients


@pytest.mark.parametrize("alpha", [1, 1.01, 1.5, 2, 3])
def test_float32_gradient_through_a_kernel(alpha):
    """The spectrum of this kernel decays through the rounding of float32."""

    def gradient(dtype):
        x = samples.to(dtype).requires_grad_()
        entropy = renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x, bandwidth=1.0), alpha)
        return torch.autograd.grad(entropy, x)[0].double()

    samples = torch.tensor(np.random.default_rng(0).normal(size=(64, 2))).float()
    expected = gradient(torch.float64)
    assert (gradient(torch.float32) - expected).norm() < 1e-4 * expected.norm()


@over_few_functionals
@over_few_routes
def test_gradient_of_bare_matrices(functional, alpha, method):
    """Not symmetric: the functional is that of the symmetric part."""
    rng = np.random.default_rng(0)
    grams = [
        gram_with_spectrum(np.array([0.5, 0.3, 0.2]), rng) + 0.05 * _antisymmetric(3, rng)
        for _ in range(3)
    ]
    assert torch.autograd.gradcheck(
        lambda *grams: functional(renyi_kd, *grams, alpha=alpha, method=method),
        tensors(grams, requires_grad=True),
        atol=1e-7,
        rtol=1e-6,
    )


def _antisymmetric(n, rng):
    x = rng.normal(size=(n, n))
    return x - x.T


@over_few_functionals
@over_cases("kernel", KERNELS, fast=["linear", "rbf"])
@over("alpha", [0.5, 2], slow=[1, 1.01, 3, 3.5, math.inf])
def test_gradient_from_samples(functional, kernel, alpha):
    """Five samples of two features: the linear kernels are singular, and the order below one."""
    samples = [np.random.default_rng(seed).normal(size=(5, 2)) for seed in range(3)]
    assert torch.autograd.gradcheck(
        lambda *samples: functional(renyi_kd, *map(kernel, samples), alpha=alpha),
        tensors(samples, requires_grad=True),
        atol=1e-7,
        rtol=1e-6,
    )


DEGENERATE = {
    "flat": np.eye(4),
    "labels": label_kernel(np.array([0, 0, 1, 1, 2, 2])),
    "repeated": gram_with_spectrum(np.array([3, 3, 1, 1, 1.0]), np.random.default_rng(0)),
    "flat of low rank": gram_with_spectrum(np.array([1, 1, 0, 0.0]), np.random.default_rng(1)),
    "rank one": np.ones((4, 4)),
}


@over_routes
@pytest.mark.parametrize("gram", DEGENERATE.values(), ids=DEGENERATE)
def test_entropy_gradient_on_degenerate_spectra(gram, alpha, method):
    """Equal to the closed form; at alpha <= 1 that of the range, zero beyond it."""
    argument = torch.tensor(gram, requires_grad=True)
    value = renyi_kd.renyi_entropy(argument, alpha, method=method)
    (gradient,) = torch.autograd.grad(value, argument)
    gradient = gradient.numpy()
    assert np.isfinite(gradient).all()
    if alpha == math.inf:  # a subgradient: (I - Q / p_max) / (ln 2 tr K), Q a state at the top
        trace, top = np.trace(gram), np.linalg.eigvalsh(gram)[-1]
        state = (np.eye(len(gram)) - math.log(2) * trace * gradient) * top / trace
        assert np.trace(state) == pytest.approx(1, abs=1e-9)
        assert np.linalg.eigvalsh(state)[0] > -1e-9
        np.testing.assert_allclose(gram @ state, top * state, atol=1e-9)
        return
    np.testing.assert_allclose(
        gradient, reference.renyi_entropy_gradient(gram, alpha), rtol=1e-9, atol=1e-9
    )


@over_routes
@pytest.mark.parametrize("family", ["full rank", "low rank", "decaying", "linear", "rbf"])
def test_entropy_gradient_on_distinct_spectra(family, alpha, method):
    gram = FAMILIES[family](12, np.random.default_rng(0))
    argument = torch.tensor(gram, requires_grad=True)
    value = renyi_kd.renyi_entropy(argument, alpha, method=method)
    (gradient,) = torch.autograd.grad(value, argument)
    expected = reference.renyi_entropy_gradient(gram, alpha)
    assert np.abs(gradient.numpy() - expected).max() < 1e-9 * np.abs(expected).max()


@over_few_functionals
@over_few_routes
@pytest.mark.parametrize("gram", DEGENERATE.values(), ids=DEGENERATE)
def test_gradients_are_finite_on_degenerate_spectra(functional, alpha, method, gram):
    gram = torch.tensor(gram, requires_grad=True)
    value = functional(renyi_kd, gram, gram, gram, alpha=alpha, method=method)
    (gradient,) = torch.autograd.grad(value, gram)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("alpha", "method"), [route for route in ROUTES if route[0] < math.inf])
def test_mutual_information_gradient_on_degenerate_spectra(alpha, method):
    """dI/dA = S'(A) - S'(A * B) * B, entrywise products, for two label kernels."""
    a, b = (label_kernel(np.array(y)) for y in ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]))
    argument = torch.tensor(a, requires_grad=True)
    value = renyi_kd.renyi_mutual_information(argument, torch.tensor(b), alpha, method=method)
    (gradient,) = torch.autograd.grad(value, argument)
    joint = reference.renyi_entropy_gradient(a * b, alpha) * b
    expected = reference.renyi_entropy_gradient(a, alpha) - joint
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-9)


# Digits near zero


@pytest.mark.parametrize("method", [None, "frobenius", "power", "eigvalsh"])
@pytest.mark.parametrize(
    ("dtype", "gap", "within"), [(torch.float64, 2**-30, 1e-6), (torch.float32, 2**-20, 1e-6)]
)
def test_near_duplicates_keep_digits(method, dtype, gap, within):
    """Two samples of cosine 1 - gap: tr A^2 = 1 - gap + gap^2 / 2."""
    gram = torch.tensor([[1, 1 - gap], [1 - gap, 1]], dtype=dtype)
    expected = -np.log1p(-gap + gap**2 / 2) / np.log(2)
    value = renyi_kd.renyi_entropy(gram, 2, method=method)
    assert value.item() == pytest.approx(expected, rel=within)


@pytest.mark.parametrize("method", [None, "frobenius", "power", "eigvalsh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_millionth_of_a_bit_of_mutual_information(method, dtype):
    gap = 2**-10
    gram = torch.tensor([[1, 1 - gap], [1 - gap, 1]], dtype=dtype)
    single, joint = gap - gap**2 / 2, (1 - (1 - gap) ** 4) / 2  # 1 - tr A^2 of each
    expected = (np.log1p(-joint) - 2 * np.log1p(-single)) / np.log(2)
    value = renyi_kd.renyi_mutual_information(gram, gram, 2, method=method)
    assert expected < 2e-6
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "method"), [*routes(1), *routes(2), *routes(3)])
def test_many_near_duplicates_keep_digits(alpha, method):
    """A spike of 1 - 1e-8 and 15 small eigenvalues: S is 2e-8 bits or so."""
    p = np.r_[1 - 1e-8, np.full(15, 1e-8 / 15)]
    gram = gram_with_spectrum(p, np.random.default_rng(0))
    value = renyi_kd.renyi_entropy(torch.tensor(gram), alpha, method=method)
    assert value.item() == pytest.approx(reference.entropy_of_spectrum(p, alpha), rel=1e-6)


@over("n, alpha", [(8, 0.5), (8, 1), (600, 2), (600, 3)], slow=[(600, 1)])
def test_no_graph_is_needed_in_inference_mode(alpha, n):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    gram = renyi_kd.rbf_kernel(x, bandwidth=1.0).requires_grad_()
    expected = renyi_kd.renyi_mutual_information(gram, gram, alpha)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            value = renyi_kd.renyi_mutual_information(gram, gram, alpha)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)


@over("alpha, number", [(2, 7), (3, 20)], slow=[(2, 20), (3, 7)])
def test_many_variables_stay_within_the_range_of_float32(alpha, number):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 512, 1, generator=generator)
    grams = renyi_kd.rbf_kernel(x, bandwidth=1.0).requires_grad_()
    exact = grams.detach().double().requires_grad_()
    value, expected = (
        renyi_kd.renyi_total_correlation(*variables, alpha=alpha) for variables in (grams, exact)
    )
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = [torch.autograd.grad(*pair)[0] for pair in ((value, grams), (expected, exact))]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_each_gradient_has_the_digits_of_its_own_dtype(alpha):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    first = renyi_kd.rbf_kernel(x.float(), bandwidth=1.0)
    second = (1e-60 * renyi_kd.rbf_kernel(y, bandwidth=1.0)).requires_grad_()
    gradients = [
        torch.autograd.grad(renyi_kd.renyi_mutual_information(k, second, alpha), second)[0]
        for k in (first, first.double())
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[1].norm()
