"""A Gram matrix known by its samples, so that the matrix itself need not exist."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import check_samples, linear_kernel


class SampleGram:
    """A Gram matrix given by its samples and a kernel, accepted wherever a Gram matrix is.

    What is made of it depends on kernel and order:

    - Linear kernels with fewer dimensions d than samples n are served by a d x d matrix that has
      the same nonzero eigenvalues, at every order. So is the joint of several linear kernels, as
      long as the product of their dimensions is below n.
    - At order 2, and by `renyi_entropy_estimate`, other kernels are evaluated tile by tile from 512
      samples on, and once more in backward. Nothing larger than the samples is kept. Only a
      bandwidth that is not given needs all distances at once, for their median.
    - In all other cases the n x n matrix is made, in float64.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        kernel: `linear_kernel`, `polynomial_kernel`, `rbf_kernel`, `laplacian_kernel`, or any other
            symmetric positive semi-definite kernel with their signature. It takes samples
            `(..., n, d)` and, if not the same, others `(..., m, d)`, and returns `(..., n, m)`.
            Each entry must depend on its own two samples alone: a kernel that takes a median of
            what it is given would take another one for each tile.
        kernel_options: passed on to `kernel`. Without a `bandwidth` the median distance over all
            pairs is taken, for at most 8192 samples.

    Raises:
        TypeError: `x` is not a floating-point tensor, `kernel` not callable, or an option unknown.
        ValueError: the shape of `x` or an option does not fit, the kernel's result is no matrix, or
            the kernel has parameters that require a gradient.

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
        self.kernel_options = kernel_options
        self._check_kernel()

    def _check_kernel(self) -> None:
        """Try the kernel on a single sample, so that a wrong one fails here."""
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
                "`kernel` must not train parameters of its own: evaluated tile by tile it would "
                "pass them no gradient. Give the Gram matrix itself, as `kernel(x)`."
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

    def matrix(self) -> Tensor:
        """Make the Gram matrix, in float64, shape `(..., n, n)`."""
        return self.kernel(self.x.double(), **self.kernel_options)


Gram: TypeAlias = Tensor | SampleGram


def as_matrix(gram: Gram) -> Tensor:
    """Return a Gram matrix as a tensor: of samples in float64, else in at least float32."""
    return gram.matrix() if isinstance(gram, SampleGram) else gram.to(compute_dtype(gram))
