"""Kernels, their bandwidth and their normalisation, against the reference."""

import numpy as np
import pytest
import reference
import torch
from functionals import tensors
from strategies import CONSTANT_DIAGONAL

import renyi_kd


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear_kernel", {}),
        ("polynomial_kernel", {"degree": 1, "offset": 0.0}),
        ("polynomial_kernel", {"degree": 3}),
        ("polynomial_kernel", {"degree": 2, "offset": 0.5}),
        ("rbf_kernel", {"bandwidth": 0.7}),
        ("rbf_kernel", {}),
        ("laplacian_kernel", {"bandwidth": 0.7}),
        ("laplacian_kernel", {}),
    ],
)
@pytest.mark.parametrize("n", [2, 4, 5, 40])
@pytest.mark.parametrize("with_y", [False, True])
def test_kernels(name, options, n, with_y):
    rng = np.random.default_rng(n)
    scale = np.arange(1, 7).reshape(2, 3, 1, 1)  # every batch element has a median of its own
    x, y = rng.normal(size=(2, 3, n, 3)) * scale, rng.normal(size=(2, 3, 6, 3))
    arguments = (x, y) if with_y else (x,)
    gram = getattr(renyi_kd, name)(*tensors(arguments), **options)
    assert gram.shape == (2, 3, n, 6 if with_y else n)
    for index in np.ndindex(2, 3):
        expected = getattr(reference, name)(*[z[index] for z in arguments], **options)
        np.testing.assert_allclose(gram[index].numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["rbf_kernel", "laplacian_kernel"])
@pytest.mark.parametrize("distinct", [1, 2])
def test_median_distance_of_zero_counts_as_one(name, distinct):
    """Of eight samples at most one differs, so that more than half of the pairs coincide."""
    x = np.zeros((8, 2))
    x[: distinct - 1] = 0.5
    argument = torch.tensor(x, requires_grad=True)
    gram = getattr(renyi_kd, name)(argument)
    (gradient,) = torch.autograd.grad(gram.sum(), argument)
    np.testing.assert_allclose(
        gram.detach().numpy(), getattr(reference, name)(x, bandwidth=1.0), rtol=1e-12
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["rbf_kernel", "laplacian_kernel"])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize(("dtype", "spread"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_distances_of_near_duplicates_keep_digits(name, n, dtype, spread):
    """|x|^2 - 2 x.y + |y|^2 would lose the distance, and with it the median, to rounding here."""
    x = 1 + spread * torch.randn(n, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = getattr(reference, name)(x.double().numpy())
    gram = getattr(renyi_kd, name)(x)
    np.testing.assert_allclose(gram.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["rbf_kernel", "laplacian_kernel"])
def test_gradient_at_coinciding_samples(name):
    """Between coinciding samples the RBF kernel is flat; the Laplacian's kink counts as flat."""
    x = np.array([[0, 0], [0, 0], [1, 2.0]])
    argument = torch.tensor(x, requires_grad=True)
    gram = getattr(renyi_kd, name)(argument, bandwidth=1.0)
    (gradient,) = torch.autograd.grad(gram.sum(), argument)
    order = 2 if name == "rbf_kernel" else 1
    pull = np.array([1, 2.0]) if order == 2 else np.array([1, 1.0])
    pull = 2 * pull * getattr(reference, name)(x, bandwidth=1.0)[0, 2]
    np.testing.assert_allclose(gradient.numpy(), [pull, pull, -2 * pull], rtol=1e-12)


def test_normalize_gram():
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    x[0, 1] = x[0, 3] = 0  # two zero samples: equal to each other, orthogonal to the rest
    grams = [reference.linear_kernel(samples) for samples in x]
    expected = np.stack([reference.normalize_gram(gram) for gram in grams])
    value = renyi_kd.normalize_gram(torch.tensor(np.stack(grams)))
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-15)
    assert expected[0, 1, 3] == 1 / 5


def test_zero_samples_pass_nothing_back():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[[1, 3]] = 0
    x.requires_grad_()
    gram = renyi_kd.normalize_gram(renyi_kd.linear_kernel(x))
    (gradient,) = torch.autograd.grad(renyi_kd.renyi_entropy(gram), x)
    assert (gradient[[1, 3]] == 0).all()
    assert gradient.isfinite().all()
    assert (gradient[[0, 2, 4]] != 0).all()


@pytest.mark.parametrize("family", CONSTANT_DIAGONAL)
def test_normalize_gram_only_scales_a_constant_diagonal(family):
    gram = CONSTANT_DIAGONAL[family](6, np.random.default_rng(0))
    value = renyi_kd.normalize_gram(torch.tensor(5 * gram))
    np.testing.assert_allclose(value.numpy(), gram / 6, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kernel",
    [
        renyi_kd.linear_kernel,
        lambda x: renyi_kd.polynomial_kernel(x, degree=3),
        renyi_kd.rbf_kernel,
        renyi_kd.laplacian_kernel,
    ],
)
def test_kernels_of_half_types_give_the_value_of_the_samples_upcast(kernel, dtype):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(kernel(x), kernel(x.float()))


@pytest.mark.parametrize("kernel", [renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel])
def test_median_bandwidth_is_a_constant_of_the_gradient(kernel):
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    order = {renyi_kd.rbf_kernel: 2, renyi_kd.laplacian_kernel: 1}[kernel]
    median = reference.median_distance(x.detach().numpy(), order)
    gradients = [
        torch.autograd.grad(renyi_kd.renyi_entropy(kernel(x, bandwidth=bandwidth), 1.5), x)[0]
        for bandwidth in (None, median)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", [renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel])
def test_a_bandwidth_may_be_a_tensor_that_learns(kernel):
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bandwidth = torch.tensor([1.3, 0.7], dtype=torch.float64)[:, None, None].requires_grad_()
    gram = kernel(x, bandwidth=bandwidth)
    for k in range(2):
        torch.testing.assert_close(gram[k], kernel(x[k], bandwidth=bandwidth[k].item()))
        torch.testing.assert_close(gram[k], kernel(x[k], bandwidth=bandwidth[k, 0, 0]))
    assert torch.autograd.gradcheck(lambda b: kernel(x, bandwidth=b), bandwidth)
