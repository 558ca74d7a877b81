"""A Gram matrix known by its samples, so that the matrix itself need not exist."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from renyi_kd._checks import check_flag
from renyi_kd._precision import compute_dtype, exact_dtype
from renyi_kd.information.distances import median_distance
from renyi_kd.information.kernels import (
    check_bandwidth,
    check_samples,
    laplacian_kernel,
    linear_kernel,
    normalized_kernel,
    polynomial_kernel,
    rbf_kernel,
)
from renyi_kd.information.rbf import rbf_gram, scaled_samples

# The median over all pairs of samples takes n x n memory. Up to this n it is a default.
_LARGEST_MEDIAN = 8192

_OF_TWO_SAMPLES = (linear_kernel, polynomial_kernel, rbf_kernel, laplacian_kernel)


class SampleGram:
    """A Gram matrix given by its samples and a kernel, accepted wherever a Gram matrix is.

    What is made of it depends on kernel and order:

    - Linear kernels with fewer dimensions d than samples n are served by a d x d matrix that has
      the same nonzero eigenvalues, at every order. So is the joint of several linear kernels, as
      long as the product of their dimensions is below n.
    - At order 2, RBF kernels are summed tile by tile. At integer orders they are in float32 if the
      samples are.
    - At order 2, and by `renyi_entropy_estimate`, other kernels are evaluated tile by tile from 512
      samples on, in float64.
    - In all other cases, and in compiled code, the n x n matrix is made, in float64.

    Tiles are evaluated once more in backward, so that nothing larger than the samples is kept. Only
    a bandwidth that is not given needs all distances at once, for their median.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        kernel: `linear_kernel`, `polynomial_kernel`, `rbf_kernel`, `laplacian_kernel`, or any other
            symmetric positive semi-definite kernel with their signature. It takes samples
            `(..., n, d)` and, if not the same, others `(..., m, d)`, and returns `(..., n, m)`.
            Each entry must depend on its own two samples alone. A kernel that takes a median of
            what it is given, or divides by its sum, would make other entries in each tile, and is
            refused.
        normalize: whether samples are normalised as by `normalize_gram` (Def. 1): each entry is
            divided by the lengths of its two samples.
        kernel_options: passed on to `kernel`. Without a `bandwidth` the median distance over all
            pairs is taken, for at most 8192 samples.

    Raises:
        TypeError: `x` is not a floating-point tensor, `kernel` not callable, or an option unknown.
        ValueError: the shape of `x` or an option does not fit, the kernel's result is no matrix, or
            the kernel has parameters that require a gradient, or an entry depends on more than its
            own two samples.

    Example:
        >>> import torch
        >>> from renyi_kd import SampleGram, rbf_kernel, renyi_entropy
        >>> x = torch.eye(3).repeat(1000, 1)
        >>> renyi_entropy(SampleGram(x), alpha=1)
        tensor(1.5850)
        >>> renyi_entropy(SampleGram(x, rbf_kernel, bandwidth=0.01))
        tensor(1.5850)
    """

    def __init__(
        self,
        x: Tensor,
        kernel: Callable[..., Tensor] = linear_kernel,
        *,
        normalize: bool = False,
        **kernel_options: Any,
    ) -> None:
        check_samples(x)
        if not callable(kernel):
            raise TypeError(
                f"`kernel` must be callable, got {type(kernel).__name__}. "
                f"Pass linear_kernel, rbf_kernel, ..."
            )
        check_flag("normalize", normalize)
        self.x = x
        self.kernel = kernel
        self.kernel_options = kernel_options
        self._check_kernel()
        if normalize and kernel is linear_kernel:
            self.x = _of_unit_length(x)
        elif normalize and kernel not in (rbf_kernel, laplacian_kernel):  # whose lengths are one
            self.kernel = normalized_kernel(kernel)

    def _check_kernel(self) -> None:
        """Try the kernel on a single sample, so that a wrong one fails here."""
        if self.kernel is rbf_kernel and self.kernel_options.keys() <= {"bandwidth"}:
            bandwidth = check_bandwidth(self.x, self.kernel_options.get("bandwidth"))
            if not isinstance(bandwidth, Tensor) or bandwidth.ndim == 0:
                self.kernel_options = {"bandwidth": bandwidth}
                if not (isinstance(bandwidth, Tensor) and bandwidth.requires_grad):
                    return
        first = self.x.detach()[..., :1, :]
        with torch.enable_grad():
            entry = self.kernel(first, first, **self.kernel_options)
        expected = (*self.x.shape[:-2], 1, 1)
        if not isinstance(entry, Tensor) or entry.shape != expected:
            found = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(
                f"`kernel` must make (..., n, m) of samples (..., n, d) and (..., m, d), of two "
                f"single ones {expected}, got {found}."
            )
        if entry.requires_grad:
            raise ValueError(
                "`kernel` must not train parameters of its own, nor a `bandwidth`: evaluated tile "
                "by tile it would pass them no gradient. Detach them, or give the Gram matrix "
                "itself, as `kernel(x)`."
            )
        if self.kernel in _OF_TWO_SAMPLES or torch.compiler.is_compiling() or self.x.is_meta:
            return
        # Samples of which no two are equal, whatever those that were given are.
        two = self.x.detach()[..., [0, -1], :].to(exact_dtype(self.x.device))
        two[..., 1, :] += torch.linspace(1, 2, two.shape[-1]).to(two)
        alone = self.kernel(two[..., :1, :], two[..., -1:, :], **self.kernel_options)
        together = self.kernel(two, **self.kernel_options)[..., :1, -1:]
        if not torch.allclose(alone, together, rtol=1e-6, atol=1e-12, equal_nan=True):
            raise ValueError(
                "Each entry of `kernel` must depend on its own two samples alone, but it changes "
                "with the samples beside them. To divide by the samples' lengths, pass "
                "normalize=True; give a bandwidth as a number; or give the Gram matrix itself, as "
                "`kernel(x)`."
            )

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.kernel_options.items())
        name = getattr(self.kernel, "__name__", repr(self.kernel))
        return f"SampleGram(<{self.x.dtype} of shape {tuple(self.x.shape)}>, {name}{options})"

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix, `(..., n, n)`."""
        return self.x.shape[:-1] + self.x.shape[-2:-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the samples."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        return self.x.device

    def tensors(self) -> list[Tensor]:
        """Return the samples and the options that are tensors."""
        options = self.kernel_options.values()
        return [self.x, *(value for value in options if isinstance(value, Tensor))]

    def cpu(self) -> "SampleGram":
        """Return the same of samples on the CPU."""
        moved = copy.copy(self)
        moved.x = self.x.cpu()
        moved.kernel_options = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in self.kernel_options.items()
        }
        return moved

    def matrix(self, *, exact: bool = True) -> Tensor:
        """Make the Gram matrix, shape `(..., n, n)`, in float64.

        If it need not be `exact`, an RBF kernel of float32 samples is in float32.
        """
        if self.kernel is not rbf_kernel or self.dtype == torch.float64:
            return self.kernel(self.x.to(exact_dtype(self.device)), **self.kernel_options)
        if not exact:
            return rbf_kernel(self.x, **self.kernel_options)
        # Rounding the samples took more digits than a product takes.
        x = self.x.to(exact_dtype(self.device))
        scaled = scaled_samples(x, self.bandwidth(order=2.0), by_product=True)
        return rbf_gram(scaled, by_product=True)

    def bandwidth(self, order: float) -> Tensor | float:
        """Return the bandwidth, by default the median distance in the norm of this order."""
        given: Tensor | float | None = self.kernel_options.get("bandwidth")
        if given is not None:
            return given
        if (n := self.shape[-1]) > _LARGEST_MEDIAN:
            raise ValueError(
                f"`bandwidth` must be given for more than {_LARGEST_MEDIAN} samples, got {n}: the "
                f"median over all pairs takes n x n memory. Take the median over some of them."
            )
        return median_distance(self.x, order)


def _of_unit_length(x: Tensor) -> Tensor:
    """Return each sample divided by its length. Zero samples share an axis of their own."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact_dtype(x.device))
    zero = length == 0
    unit = x / torch.where(zero, 1.0, length)
    return torch.cat([unit, zero.to(unit.dtype)], dim=-1).to(x.dtype)


Gram: TypeAlias = Tensor | SampleGram


def as_matrix(gram: Gram, *, exact: bool = True) -> Tensor:
    """Return a Gram matrix as a tensor, at least float32; see `SampleGram.matrix`."""
    if isinstance(gram, SampleGram):
        return gram.matrix(exact=exact)
    return gram.to(compute_dtype(gram))
