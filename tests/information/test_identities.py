"""Laws of the matrix-based Rényi entropy, each under its exact condition.

I >= 0 is no law but at order one with a constant diagonal; neither joint >= marginal nor
I <= entropy is one for unequal row norms. None of these is asserted, nor clamped.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import CONSTANT_DIAGONAL, gram_matrices, known_spectra, label_kernel

from renyi_kd import (
    renyi_conditional_entropy,
    renyi_entropy,
    renyi_joint_entropy,
    renyi_mutual_information,
    renyi_total_correlation,
)

TOLERANCE = 1e-9  # bits
orders = st.one_of(
    st.sampled_from([0.3, 0.5, 0.99, 1, 1.00001, 1.01, 1.5, 2, 3, 3.5, 5, 10, math.inf]),
    st.floats(0.3, 40),
)
finite_orders = orders.filter(math.isfinite)


def entropy(gram, alpha):
    return renyi_entropy(torch.tensor(gram), alpha).item()


def joint(*grams, alpha):
    return renyi_joint_entropy(*map(torch.tensor, grams), alpha=alpha).item()


def information(a, b, alpha):
    return renyi_mutual_information(torch.tensor(a), torch.tensor(b), alpha).item()


def trace_of_power(gram, alpha):
    return 2 ** ((1 - alpha) * entropy(gram, alpha))


def close(value, expected):
    return value == pytest.approx(expected, abs=TOLERANCE)


# Any positive semi-definite matrix


@given(known_spectra(), orders)
def test_between_zero_and_log_rank(spectrum, alpha):
    gram, eigenvalues = spectrum
    assert entropy(gram, alpha) >= -TOLERANCE
    assert entropy(gram, alpha) <= math.log2(np.count_nonzero(eigenvalues)) + TOLERANCE


@given(st.integers(1, 64), orders)
def test_extremes(n, alpha):
    assert close(entropy(np.ones((n, n)), alpha), 0)
    assert close(entropy(np.eye(n), alpha), math.log2(n))


@given(gram_matrices(), orders, orders)
def test_non_increasing_in_alpha(grams, alpha, beta):
    low, high = sorted([alpha, beta])
    assert entropy(*grams, low) >= entropy(*grams, high) - TOLERANCE


@given(gram_matrices(), finite_orders.filter(lambda alpha: alpha > 1))
def test_bounds_by_the_min_entropy(grams, alpha):
    lowest = entropy(*grams, math.inf)
    assert lowest - TOLERANCE <= entropy(*grams, alpha)
    assert entropy(*grams, alpha) <= alpha / (alpha - 1) * lowest + TOLERANCE * alpha / (alpha - 1)


@given(gram_matrices(), orders, st.floats(1e-6, 1e6), st.randoms(use_true_random=False))
def test_invariances(grams, alpha, scale, random):
    (gram,) = grams
    n = len(gram)
    order = random.sample(range(n), n)
    rotation, _ = np.linalg.qr(np.random.default_rng(random.randrange(99)).normal(size=(n, n)))
    expected = entropy(gram, alpha)
    assert close(entropy(scale * gram, alpha), expected)
    assert close(entropy(gram[np.ix_(order, order)], alpha), expected)
    assert close(entropy(rotation @ gram @ rotation.T, alpha), expected)


@given(gram_matrices(2, same_size=False), orders)
def test_kronecker_product_adds(grams, alpha):
    a, b = grams
    assert close(entropy(np.kron(a, b), alpha), entropy(a, alpha) + entropy(b, alpha))


@given(gram_matrices(2), orders, st.integers(2, 4))
def test_duplicating_every_sample_changes_nothing(grams, alpha, times):
    a, b = grams
    twins = [np.kron(gram, np.ones((times, times))) for gram in grams]
    assert close(entropy(twins[0], alpha), entropy(a, alpha))
    assert close(information(*twins, alpha), information(a, b, alpha))


@given(gram_matrices(2, same_size=False), finite_orders, st.floats(0.01, 0.99))
def test_trace_of_power_of_a_direct_sum(grams, alpha, t):
    a, b = grams
    a, b = a / np.trace(a), b / np.trace(b)
    zero = np.zeros((len(a), len(b)))
    direct_sum = np.block([[t * a, zero], [zero.T, (1 - t) * b]])
    parts = t**alpha * trace_of_power(a, alpha) + (1 - t) ** alpha * trace_of_power(b, alpha)
    assert trace_of_power(direct_sum, alpha) == pytest.approx(parts, rel=1e-7)


@given(known_spectra())
def test_limits(spectrum):
    gram, p = spectrum
    p = p[p > 0]
    von_neumann = -np.sum(p * np.log2(p))
    assert close(entropy(gram, 1), von_neumann)
    assert close(entropy(gram, 1 + 1e-12), von_neumann)
    assert close(entropy(gram, 1 - 1e-12), von_neumann)
    assert close(entropy(gram, math.inf), -np.log2(p.max()))
    assert close(entropy(gram, 1e12), -np.log2(p.max()))


@given(gram_matrices(2), orders)
def test_mutual_information_is_symmetric(grams, alpha):
    a, b = grams
    assert close(information(a, b, alpha), information(b, a, alpha))


@given(gram_matrices(), orders)
def test_joint_with_a_constant_variable(grams, alpha):
    (gram,) = grams
    constant = np.ones_like(gram)
    assert close(joint(gram, constant, alpha=alpha), entropy(gram, alpha))
    assert close(information(gram, constant, alpha), 0)


@given(gram_matrices(3), orders)
def test_functionals_are_sums_of_entropies(grams, alpha):
    a, b, c = map(torch.tensor, grams)
    pair = joint(*grams[:2], alpha=alpha)
    triple = joint(*grams, alpha=alpha)
    of_a, of_b, of_c = (entropy(gram, alpha) for gram in grams)
    assert close(joint(grams[0], alpha=alpha), of_a)
    assert close(joint(*grams[::-1], alpha=alpha), triple)
    assert close(renyi_conditional_entropy(a, b, alpha).item(), pair - of_b)
    assert close(renyi_mutual_information([a, b], c, alpha).item(), pair + of_c - triple)
    assert close(renyi_mutual_information(c, [b, a], alpha).item(), pair + of_c - triple)
    assert close(renyi_total_correlation(a, b, c, alpha=alpha).item(), of_a + of_b + of_c - triple)


@given(known_spectra(), finite_orders)
def test_gradient_of_the_trace_of_a_power(spectrum, alpha):
    """tr A^alpha through S_alpha; its part along A, <A, alpha A^(alpha-1)> = alpha tr A^alpha.

    S divides by the trace, which takes alpha tr A^alpha I off the gradient.
    """
    gram, p = spectrum
    assume(alpha >= 1 or p.min() > 0)
    assume(abs(alpha - 1) > 1e-3)  # tr A = 1 has no gradient of its own
    argument = torch.tensor(gram, requires_grad=True)
    trace = 2 ** ((1 - alpha) * renyi_entropy(argument, alpha))
    (gradient,) = torch.autograd.grad(trace, argument)
    values, basis = np.linalg.eigh(gram)
    values = np.where(values > 1e-14, values, 0)
    value = np.sum(values**alpha)
    expected = alpha * ((basis * values ** (alpha - 1)) @ basis.T - value * np.eye(len(gram)))
    scale = alpha * values[-1] ** (alpha - 1)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=1e-8 * scale)
    assert trace.item() == pytest.approx(value, rel=1e-7)


@given(gram_matrices(2), orders)
def test_gradient_is_orthogonal_to_the_gram_matrix(grams, alpha):
    """The entropy does not change with the scale of K."""
    a, b = (torch.tensor(gram, requires_grad=True) for gram in grams)
    value = renyi_mutual_information(a, b, alpha)
    for gram, gradient in zip((a, b), torch.autograd.grad(value, (a, b)), strict=True):
        size = (gram * gradient).detach().abs().sum().item()
        assert (gram * gradient).sum().item() == pytest.approx(0, abs=1e-9 * max(1, size))


# Constant diagonal


@given(gram_matrices(2, families=CONSTANT_DIAGONAL), orders)
def test_joint_entropy_is_at_least_each(grams, alpha):
    a, b = grams
    entropies = entropy(a, alpha), entropy(b, alpha)
    assert joint(a, b, alpha=alpha) >= max(entropies) - TOLERANCE
    assert information(a, b, alpha) <= min(entropies) + TOLERANCE


@given(gram_matrices(families=CONSTANT_DIAGONAL), orders)
def test_joint_with_distinct_samples_is_log_n(grams, alpha):
    n = len(grams[0])
    assert close(joint(*grams, np.eye(n) / n, alpha=alpha), math.log2(n))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=13), orders)
def test_labels_tell_all_of_themselves(labels, alpha):
    gram = label_kernel(np.array(labels))
    assert close(information(gram, gram, alpha), entropy(gram, alpha))


@given(gram_matrices(2, families=CONSTANT_DIAGONAL))
def test_mutual_information_of_order_one_is_non_negative(grams):
    assert information(*grams, 1) >= -TOLERANCE


# Counter-examples to what one might expect


@pytest.mark.parametrize(("alpha", "expected"), [(1.5, -0.0195), (2, -0.0716), (3, -0.1105)])
def test_mutual_information_can_be_negative(alpha, expected):
    x, y = (label_kernel(np.array(labels)) for labels in ([0, 0, 0, 0, 1], [0, 0, 0, 1, 0]))
    assert information(x, y, alpha) == pytest.approx(expected, abs=1e-4)


def test_joint_entropy_can_be_below_one_of_its_parts():
    samples = np.array([[1.0], [3.0]])
    x, y = samples @ samples.T, np.eye(2)
    assert entropy(x, 2) == pytest.approx(0, abs=1e-12)
    assert entropy(y, 2) == pytest.approx(1, abs=1e-12)
    assert joint(x, y, alpha=2) == pytest.approx(-math.log2(0.82), abs=1e-12)  # 0.286
