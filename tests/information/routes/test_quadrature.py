"""The mathematics of the estimates: quadrature rules, fits, and what many vectors make exact."""

import numpy as np
import pytest
import torch
from strategies import gram_with_spectrum

from renyi_kd.information.routes import quadrature
from renyi_kd.information.routes.quadrature import Vectors, power_trace


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def trace_one_matrix(n=12, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.1, 1, n)
    return torch.tensor(gram_with_spectrum(p / p.sum(), rng))


def test_rules_are_exact_up_to_their_degree():
    """For v'A^kv: the Gauss rule of three steps up to k = 5, the Gauss-Radau rule up to k = 6."""
    matrix = trace_one_matrix()
    vector = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vector /= vector.norm()
    steps = quadrature._lanczos_steps(matrix.matmul, vector, matrix @ vector, 3)
    nodes, eigenvectors = quadrature._gauss_and_radau(*steps[1:])
    for k in range(8):
        exact = (vector.mT @ torch.linalg.matrix_power(matrix, k) @ vector).item()
        gauss, radau = (eigenvectors[..., 0, :].square() * nodes**k).sum(dim=-1)
        for rule, degree in ((gauss, 5), (radau, 6)):
            assert (abs(rule.item() - exact) < 1e-12 * exact) == (k <= degree), (k, degree)
    # Of a power between the degrees the integral lies between the rules.
    eigenvalues, basis = torch.linalg.eigh(matrix)
    exact = ((basis.mT @ vector).square().squeeze() * eigenvalues**5.5).sum()
    gauss, radau = (eigenvectors[..., 0, :].square() * nodes**5.5).sum(dim=-1)
    assert gauss < exact < radau


def test_the_fit_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x, y, weight = rng.uniform(0, 1, 9), rng.normal(size=9), rng.dirichlet(np.ones(9))
    slope, bend, shift = (
        z.item() for z in quadrature._quadratic_fit(*map(torch.tensor, (x, weight, y)))
    )
    curvature, line, _ = np.polyfit(x, y, 2, w=np.sqrt(weight))
    assert bend == pytest.approx(curvature)
    assert slope - bend * shift == pytest.approx(line)
    # Without the curve it is the fit of a line, since the two terms are uncorrelated.
    assert slope == pytest.approx(np.polyfit(x, y, 1, w=np.sqrt(weight))[0])


@pytest.mark.parametrize("alpha", [1.5, 2, 3.7])
def test_control_variates_take_the_variance_of_a_quadratic_spectrum(alpha):
    """Off the range the power is nearly a parabola here, whose sum is known from trace and norm."""
    matrix = torch.diag(torch.linspace(1, 1.05, 200, dtype=torch.float64))
    matrix /= matrix.trace()
    exact = (matrix.diagonal() ** alpha).sum().item()
    for seed in range(5):
        vectors = Vectors(rank=2, probes=8, generator=seeded(seed))
        estimate = power_trace(matrix.matmul, matrix.square().sum(), alpha, matrix, vectors)
        # The spread of the probes alone would leave 1e-2.
        assert estimate.value.item() == pytest.approx(exact, rel=1e-4)
        assert estimate.error < 1e-4 * exact


@pytest.mark.parametrize("alpha", [1.5, 2, 3])
def test_a_range_that_holds_all_makes_value_and_gradient_exact(alpha):
    rng = np.random.default_rng(0)
    p = np.r_[rng.uniform(0.5, 1, 4), np.zeros(26)]
    matrix = torch.tensor(gram_with_spectrum(p / p.sum(), rng))
    vectors = Vectors(rank=4, probes=4, generator=seeded(0))
    estimate = power_trace(matrix.matmul, matrix.square().sum(), alpha, matrix, vectors)
    eigenvalues, basis = torch.linalg.eigh(matrix)
    eigenvalues = eigenvalues.clamp(min=0)
    assert estimate.value.item() == pytest.approx((eigenvalues**alpha).sum().item(), rel=1e-9)
    left, right = estimate.left, estimate.right
    gradient = (left @ right.mT + right @ left.mT) / 2 + estimate.slope * matrix
    gradient += estimate.constant * torch.eye(30)
    expected = (basis * alpha * eigenvalues ** (alpha - 1)) @ basis.mT
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
