"""Gram matrices given by their samples, so that the n x n matrix need not exist."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import (
    check_samples,
    distance,
    laplacian_kernel,
    linear_kernel,
    median_distance,
    rbf_kernel,
)
from renyi_kd.information.routes.eigenvalues import Method, spectral_entropy, trace_one

# Up to so many samples the median distance over all pairs, in n x n memory, is a default.
LARGEST_MEDIAN = 8192

# Squared distances from the mean, in bandwidths, whose products leave distances 1e-9 exact.
_FAR = 1e6


class SampleGram:
    """A Gram matrix that is known by its samples and a kernel, accepted wherever a matrix is.

    For the linear kernel with fewer dimensions d than samples n the d x d matrix with the same
    nonzero eigenvalues takes its place, at every order; so it does for a joint of linear kernels
    whose dimensions have a product below n. At order 2 and with `method="lanczos"` other kernels
    are evaluated tile by tile, and again in backward; nothing larger than the samples is kept, but
    for the median of a bandwidth that is not given. All else makes the n x n matrix, in float64.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        kernel: `linear_kernel`, `polynomial_kernel`, `rbf_kernel`, `laplacian_kernel`, or any
            symmetric positive semi-definite kernel with their signature: `(..., n, d)` and
            `(..., m, d)` to `(..., n, m)`, each entry from its own two samples.
        kernel_options: passed on to `kernel`. Without a `bandwidth` the median over all pairs is
            taken, up to 8192 samples.

    Raises:
        TypeError: `x` is not a floating-point tensor, `kernel` not callable, or an option unknown.
        ValueError: the shape of `x` or an option does not fit, the kernel's result is no matrix, or
            it has parameters that require a gradient.

    Example:
        >>> from renyi_kd import rbf_kernel, renyi_entropy
        >>> x = torch.eye(3).repeat(1000, 1)
        >>> renyi_entropy(SampleGram(x), alpha=1)
        tensor(1.5850)
        >>> renyi_entropy(SampleGram(x, rbf_kernel, bandwidth=0.01))
        tensor(1.5850)
    """

    def __init__(
        self, x: Tensor, kernel: Callable[..., Tensor] = linear_kernel, **kernel_options: Any
    ) -> None:
        check_samples(x)
        if not callable(kernel):
            raise TypeError(
                f"`kernel` must be callable, got {type(kernel).__name__}. "
                f"Pass linear_kernel, rbf_kernel, ..."
            )
        self.x = x
        self.kernel = kernel
        self.options = kernel_options
        first = x.detach()[..., :1, :]
        with torch.enable_grad():
            entry = kernel(first, first, **kernel_options)
        if not isinstance(entry, Tensor) or entry.shape != (*x.shape[:-2], 1, 1):
            found = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(
                f"`kernel` must make (..., n, m) of samples (..., n, d) and (..., m, d), of two "
                f"single ones {(*x.shape[:-2], 1, 1)}, got {found}."
            )
        if entry.requires_grad:
            raise ValueError(
                "`kernel` must not train parameters of its own: evaluated tile by tile it would "
                "pass them no gradient. Give the Gram matrix itself, as `kernel(x)`."
            )

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        name = getattr(self.kernel, "__name__", repr(self.kernel))
        return f"SampleGram(<{self.x.dtype} of shape {tuple(self.x.shape)}>, {name}{options})"

    @property
    def shape(self) -> torch.Size:
        """`(..., n, n)`."""
        return self.x.shape[:-1] + self.x.shape[-2:-1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the samples."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """That of the samples."""
        return self.x.device

    def matrix(self) -> Tensor:
        """The Gram matrix, float64, shape `(..., n, n)`."""
        return self.kernel(self.x.double(), **self.options)

    def tiles(self) -> "Tiles":
        """The matrix up to a constant factor, to be evaluated tile by tile.

        A zero matrix becomes all ones, the limit of adding a constant.

        Raises:
            ValueError: no `bandwidth` for more than 8192 samples.
        """
        x = self.x.double()
        if self.kernel in (rbf_kernel, laplacian_kernel):
            return self._tiles_of_distances(x / self._bandwidth())
        each = x.unsqueeze(-2)
        diagonal = self.kernel(each, each, **self.options)[..., 0, 0]
        trace = diagonal.detach().sum(dim=-1)[..., None, None]
        zero = trace == 0
        scale, shift = x.shape[-2] / torch.where(zero, 1.0, trace), zero.double()

        def evaluate(a: Tensor, b: Tensor) -> Tensor:
            return self.kernel(a, b, **self.options) * scale + shift

        return Tiles(x, x, evaluate, diagonal * scale[..., 0] + shift[..., 0])

    def _tiles_of_distances(self, x: Tensor) -> "Tiles":
        """Of samples in units of the bandwidth."""
        ones = torch.ones_like(x[..., 0])
        if self.kernel is laplacian_kernel:
            return Tiles(x, x, lambda a, b: (-distance(a, b, 1.0)).exp(), ones)
        # No distance sees the mean; near it the rounding errors of inner products are smallest.
        centred = x - x.detach().mean(dim=-2, keepdim=True)
        squares = centred.square().sum(dim=-1, keepdim=True) / -2
        if not x.is_meta and (squares.detach() < -_FAR).any():
            return Tiles(x, x, lambda a, b: (distance(a, b, 2.0).square() / -2).exp(), ones)
        # -|x - y|^2 / 2 as one inner product. Samples innermost: the matrix products of backward,
        # of few columns, are faster so.
        one = torch.ones_like(squares)
        rows = torch.cat([centred.mT, squares.mT, one.mT], dim=-2).mT
        columns = torch.cat([centred.mT, one.mT, squares.mT], dim=-2).mT
        return Tiles(rows, columns, lambda a, b: (a @ b.mT).exp(), ones)

    def _bandwidth(self) -> Tensor | float:
        bandwidth: float | None = self.options.get("bandwidth")
        if bandwidth is not None:
            return bandwidth
        if self.x.shape[-2] > LARGEST_MEDIAN:
            raise ValueError(
                f"`bandwidth` must be given for more than {LARGEST_MEDIAN} samples, got "
                f"{self.x.shape[-2]}: the median over all pairs takes n x n memory. "
                f"Take the median over some of them."
            )
        return median_distance(self.x, p=2.0 if self.kernel is rbf_kernel else 1.0)


@dataclass(frozen=True)
class Matrix:
    """A matrix whose entry of samples a and b is `evaluate(rows[a], columns[b])`."""

    rows: Tensor
    columns: Tensor
    evaluate: Callable[[Tensor, Tensor], Tensor]

    def __getitem__(self, tile: tuple[slice, slice]) -> Tensor:
        i, j = tile
        return self.evaluate(self.rows[..., i, :], self.columns[..., j, :])


@dataclass(frozen=True)
class Tiles(Matrix):
    """One with its diagonal, shape `(..., n)`."""

    diagonal: Tensor


def has_dual(grams: Sequence[SampleGram]) -> bool:
    """Whether all are of linear kernels, with a product of dimensions below n."""
    linear = all(x.kernel is linear_kernel for x in grams)
    return linear and math.prod([x.x.shape[-1] for x in grams]) < grams[0].shape[-1]


def entropy_of_dual(grams: Sequence[SampleGram], alpha: float, method: Method) -> Tensor:
    r"""Joint entropy of linear kernels, in bits, float64, shape `(...)`.

    The joint of linear kernels is that of :math:`Z`, whose rows are the Kronecker products of a
    sample's vectors, and :math:`Z^\top Z` has the nonzero eigenvalues of :math:`Z Z^\top`.
    """
    factors = [_of_size_one(x.x.double()) for x in grams]
    z = reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)
    z = _mean_along_first_axis(z)
    dual = trace_one(z.mT @ z)
    if method == "frobenius":
        return -(-_one_minus_squared_norm(dual)).log1p() / math.log(2)
    # Rounded samples move singular values by a relative epsilon, eigenvalues by its square.
    epsilon = torch.finfo(compute_dtype(*grams)).eps ** 2
    return spectral_entropy(dual, alpha, method, epsilon=max(epsilon, torch.finfo(dual.dtype).eps))


def _of_size_one(x: Tensor) -> Tensor:
    """The samples in units of the largest entry, a constant; zeros alone as ones.

    All equal they share no information, which is the limit of adding a constant to their kernel.
    """
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest == 0, 1.0, x / torch.where(largest == 0, 1.0, largest))


def _mean_along_first_axis(z: Tensor) -> Tensor:
    """The samples, reflected so that their mean lies along the first axis.

    The spectrum does not change, but of near-duplicate samples all other axes hold the differences.
    """
    mean = z.detach().mean(dim=-2, keepdim=True)
    axis = torch.zeros_like(mean)
    axis[..., 0] = 1.0
    normal = mean + axis * mean.norm(dim=-1, keepdim=True).copysign(mean[..., :1])
    square = normal.square().sum(dim=-1, keepdim=True)
    reflected: Tensor = z - (z @ normal.mT) * (normal * (2 / torch.where(square == 0, 1.0, square)))
    return reflected


def _one_minus_squared_norm(matrix: Tensor) -> Tensor:
    r""":math:`1 - \lVert A \rVert_F^2` of trace-one matrices, of which `A[0, 0]` may be nearly one.

    As sums of :math:`A_{aa} A_{bb} - A_{ab}^2` over all other pairs no digits cancel.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    first, rest = diagonal[..., 0], diagonal[..., 1:]
    minors = first * rest.sum(dim=-1) + (rest * (1 - rest)).sum(dim=-1)
    return minors - (matrix - torch.diag_embed(diagonal)).square().sum(dim=(-2, -1))
