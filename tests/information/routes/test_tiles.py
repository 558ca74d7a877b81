"""Kernels of many samples, gone through tile by tile."""

import pytest
import reference
import torch
from functionals import (
    SAMPLE_KERNELS,
    over_few_functionals,
    over_functionals,
    samples,
    tensors,
)
from grids import over_cases, small_tiles

import renyi_kd
from renyi_kd import SampleGram

over_kernels = over_cases("kernel", SAMPLE_KERNELS, fast=SAMPLE_KERNELS)


@pytest.mark.usefixtures("small_tiles")
@over_functionals
@over_kernels
def test_streamed_samples(functional, kernel):
    of, options, of_reference = kernel
    x = samples(10, 12)
    grams = [SampleGram(z, of, **options) for z in tensors(x)]
    value = functional(renyi_kd, *grams, alpha=2)
    expected = functional(reference, *[of_reference(z, **options) for z in x], alpha=2)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("small_tiles")
@over_few_functionals
@over_cases("kernel", SAMPLE_KERNELS, fast=["linear", "rbf", "laplacian"])
@pytest.mark.parametrize("d", [2, 8])
def test_gradient_from_samples(functional, kernel, d):
    """By the dual, and by tiles."""
    of, options, _ = kernel
    bandwidth = {"bandwidth": 2.0} if of in (renyi_kd.rbf_kernel, renyi_kd.laplacian_kernel) else {}
    options = options | bandwidth  # the median is a constant of the gradient, but not of numbers

    def value(*x):
        return functional(renyi_kd, *[SampleGram(z, of, **options) for z in x], alpha=2)

    x = tensors(samples(7, d), requires_grad=True)
    assert torch.autograd.gradcheck(value, x, atol=1e-8, rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_streamed_batches():
    x = torch.randn(2, 1, 10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = [x.requires_grad_(), y.requires_grad_()]

    def value(x, y):
        return renyi_kd.renyi_mutual_information(
            *(SampleGram(z, renyi_kd.rbf_kernel, bandwidth=2.0) for z in (x, y))
        )

    expected = renyi_kd.renyi_mutual_information(
        *(renyi_kd.rbf_kernel(z, bandwidth=2.0) for z in arguments)
    )
    torch.testing.assert_close(value(*arguments), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(value, arguments)


@pytest.mark.parametrize("kernel", ["rbf, median", "laplacian, median"])
def test_the_median_of_streamed_samples_is_detached(kernel):
    of, _, of_reference = SAMPLE_KERNELS[kernel]
    (x,) = tensors(samples(600, 2, 1), requires_grad=True)
    value = renyi_kd.renyi_entropy(SampleGram(x, of))
    expected = renyi_kd.renyi_entropy(of(x))
    assert value.item() == pytest.approx(
        reference.renyi_entropy(of_reference(x.detach().numpy())), abs=1e-9
    )
    torch.testing.assert_close(*[torch.autograd.grad(y, x)[0] for y in (value, expected)])


@small_tiles
def test_progress_sees_the_tiles_of_both_passes():
    seen = []

    def progress(tiles):
        for tile in tiles:
            seen.append(tile)
            yield tile

    (x,) = tensors(samples(1200, 2, 1), requires_grad=True)
    gram = SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)
    value = renyi_kd.renyi_entropy(gram, progress=progress)
    assert len(seen) == 6  # of three by three tiles those of the triangle
    value.backward()
    assert len(seen) == 12


@small_tiles
def test_streaming_makes_no_matrix():
    """Nothing of more than a few tiles is allocated, of a matrix of 0.5 GB."""
    (x,) = tensors(samples(8192, 2, 1), torch.float32, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        renyi_kd.renyi_entropy(SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)).backward()
    assert max(event.cpu_memory_usage for event in profiler.events()) < 2**24


def test_streamed_samples_have_no_second_derivative():
    (x,) = tensors(samples(600, 3, 1), requires_grad=True)
    value = renyi_kd.renyi_entropy(SampleGram(x, renyi_kd.laplacian_kernel, bandwidth=1))
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative. Give the Gram matrix itself"):
        torch.autograd.grad(gradient.sum(), x)


def labels_kernel(a, b=None):
    """Whether two samples are on the same side. It has no gradient."""
    sides = [(z[..., :1] > 0) for z in (a, a if b is None else b)]
    return (sides[0] == sides[1].mT).to(a.dtype)


@pytest.mark.parametrize("n", [60, 600])
def test_a_kernel_without_gradient_passes_none(n):
    (x,) = tensors(samples(n, 3, 1), requires_grad=True)
    labels, rbf = SampleGram(x, labels_kernel), SampleGram(x, renyi_kd.rbf_kernel, bandwidth=1.0)
    (gradient,) = torch.autograd.grad(renyi_kd.renyi_mutual_information(labels, rbf), x)
    constant, gram = labels_kernel(x.detach()), renyi_kd.rbf_kernel(x, bandwidth=1.0)
    (expected,) = torch.autograd.grad(renyi_kd.renyi_mutual_information(constant, gram), x)
    torch.testing.assert_close(gradient, expected)
