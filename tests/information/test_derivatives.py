"""Derivatives beyond a gradient backwards: forward mode, `torch.func`, and orders next to one."""

import math

import pytest
import torch
from functionals import samples, tensors
from torch.autograd import forward_ad

import renyi_kd
from renyi_kd import SampleGram

FUNCTIONALS = {
    "rbf": lambda x, alpha: renyi_kd.renyi_entropy(renyi_kd.rbf_kernel(x, bandwidth=2), alpha),
    "laplacian": lambda x, alpha: renyi_kd.renyi_entropy(
        renyi_kd.laplacian_kernel(x, bandwidth=5), alpha
    ),
    "dual": lambda x, alpha: renyi_kd.renyi_entropy(SampleGram(x), alpha),
    "two kernels": lambda x, alpha: renyi_kd.renyi_mutual_information(
        SampleGram(x, renyi_kd.rbf_kernel, bandwidth=2),
        renyi_kd.normalize_gram(renyi_kd.polynomial_kernel(x, degree=2)),
        alpha=alpha,
    ),
}
over_functionals = pytest.mark.parametrize("functional", FUNCTIONALS)
# Above and below the size from which matrices are gone through tile by tile.
over_sizes = pytest.mark.parametrize("n", [7, 520])
over_alphas = pytest.mark.parametrize("alpha", [2, 3, 0.5, math.inf])


def backwards(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


@over_functionals
@over_sizes
@over_alphas
def test_forward_mode_is_the_gradient_along_the_tangent(functional, n, alpha):
    x, tangent = tensors(samples(n, 3, 2))
    f = FUNCTIONALS[functional]
    expected = (backwards(lambda x: f(x, alpha), x) * tangent).sum().item()
    _, slope = torch.func.jvp(lambda x: f(x, alpha), (x,), (tangent,))
    assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(x, tangent), alpha)
        slope = forward_ad.unpack_dual(value).tangent
    assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", [1, 1.5])
def test_forward_mode_of_a_singular_matrix(alpha):
    x, tangent = tensors(samples(7, 3, 2))

    def f(x):
        return renyi_kd.renyi_entropy(renyi_kd.linear_kernel(x), alpha)

    _, slope = torch.func.jvp(f, (x,), (tangent,))
    assert slope.item() == pytest.approx((backwards(f, x) * tangent).sum().item(), rel=1e-9)


@over_functionals
@over_sizes
@over_alphas
def test_transforms_of_torch_func(functional, n, alpha):
    pair = torch.stack(tensors(samples(n, 3, 2)))

    def f(x):
        return FUNCTIONALS[functional](x, alpha)

    expected = torch.stack([backwards(f, x) for x in pair])
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(pair), expected)
    torch.testing.assert_close(torch.func.jacrev(f)(pair[0]), expected[0])
    torch.testing.assert_close(torch.vmap(f)(pair), torch.stack([f(x) for x in pair]))


@pytest.mark.parametrize("alpha", [2, 3, 1.5])
def test_hessian_is_the_slope_of_the_gradient(alpha):
    x, tangent = tensors(samples(5, 2, 2))

    def f(x):
        return FUNCTIONALS["rbf"](x, alpha)

    h = 1e-5
    slope = (backwards(f, x + h * tangent) - backwards(f, x - h * tangent)) / (2 * h)
    hessian = torch.func.hessian(f)(x)
    torch.testing.assert_close((hessian * tangent).sum(dim=(2, 3)), slope, rtol=1e-6, atol=1e-8)


def test_estimates_say_what_they_lack():
    (x,) = tensors(samples(200, 3, 1))

    def f(x):
        return renyi_kd.renyi_entropy_estimate(renyi_kd.rbf_kernel(x), alpha=3).bits

    for transform in (torch.func.grad(f), lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"estimate has no derivative in forward mode"):
            transform(x)


@pytest.mark.parametrize("kernel", ["rbf", "two kernels"])
@pytest.mark.parametrize("distance", [1e-16, 1e-14, 1e-12, 1e-9])
@pytest.mark.parametrize("side", [-1, 1])
def test_gradients_keep_their_digits_next_to_order_one(kernel, distance, side):
    (x,) = tensors(samples(6, 5, 1))
    alpha = math.nextafter(1, 1 + side) if distance < 1e-15 else 1 + side * distance
    at_one = backwards(lambda x: FUNCTIONALS[kernel](x, 1), x)
    near = backwards(lambda x: FUNCTIONALS[kernel](x, alpha), x)
    assert (near - at_one).norm() < (10 * distance + 1e-12) * at_one.norm()


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.9])
def test_entropies_below_order_one_stay_in_range(alpha):
    """Of near-duplicates in float32, whose small eigenvalues are rounding errors."""
    for x in tensors(samples(32, 3, 50), torch.float32):
        gram = (-torch.cdist(1e-3 * x, 1e-3 * x).square() / 2).exp()
        assert 0 <= renyi_kd.renyi_entropy(gram, alpha) <= 5
