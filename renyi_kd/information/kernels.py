"""Kernels, and Gram matrices normalised to trace one (InfoSAM, Def. 1, Eq. 19 and 20).

The arithmetic is float64, which neither autocast nor `torch.set_float32_matmul_precision` touches,
forward or backward; results have the promoted dtype of the arguments, at least float32. Feature
maps alone, of which a float64 copy would cost too much, are summed otherwise: see `sample_gram`.
"""

from typing import Any

import torch
from torch import Tensor

from renyi_kd._checks import (
    check_batch_dimensions,
    check_floating,
    check_gram,
    check_integer,
    check_real,
    check_same_device,
)
from renyi_kd._precision import compute_dtype, ieee_dtype

# Inner products of maps of at least `_LONG` features are summed in float32 over chunks of `_CHUNK`
# and in float64 over the chunks. Rounding errors of 6e-8 average out to some 1e-9, or to 1e-8 if
# the features have half precision: squares of short numbers are rounded down more often than up.
_LONG = 2**18
_CHUNK = 128
# Elements of a block's copy in another dtype, or of its chunks' Gram matrices.
_BLOCK = 2**17


def linear_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    r"""Gram matrix of the linear kernel :math:`\kappa(x, y) = x^\top y` (InfoSAM, Eq. 19).

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, or the devices differ.

    Example:
        >>> linear_kernel(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[1., 1.],
                [1., 5.]])
    """
    dtype = check_samples(x, y)
    return inner_products(x, y).to(dtype)


def polynomial_kernel(
    x: Tensor, y: Tensor | None = None, *, degree: int, offset: float = 1.0
) -> Tensor:
    r"""Gram matrix of the polynomial kernel :math:`\kappa(x, y) = (x^\top y + c)^p`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.
        degree: :math:`p`, an integer >= 1.
        offset: :math:`c` >= 0.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or `degree` not an integer.
        ValueError: the shapes do not fit, the devices differ, `degree` < 1 or `offset` < 0
            (the kernel would not be positive semi-definite).

    Example:
        >>> polynomial_kernel(torch.tensor([[1.0], [2.0]]), degree=2)
        tensor([[ 4.,  9.],
                [ 9., 25.]])
    """
    dtype = check_samples(x, y)
    degree = check_integer("degree", degree, minimum=1)
    offset = check_real("offset", offset, minimum=0)
    return ((inner_products(x, y) + offset) ** degree).to(dtype)


def rbf_kernel(x: Tensor, y: Tensor | None = None, *, bandwidth: float | None = None) -> Tensor:
    r"""Gram matrix of :math:`\kappa(x, y) = \exp(-\lVert x - y \rVert_2^2 / (2 \sigma^2))`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.
        bandwidth: :math:`\sigma` > 0. Default: the median Euclidean distance over the pairs
            i < j of `x`, detached, one for each matrix of a batch; 1 if that is zero.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, the devices differ, or `bandwidth` <= 0.

    Example:
        >>> rbf_kernel(torch.tensor([[0.0], [1.0]]), bandwidth=1.0)
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    dtype = check_samples(x, y)
    distances, sigma = _distances(x, y, p=2.0, bandwidth=bandwidth)
    return (-(distances / sigma).square() / 2).exp().to(dtype)


def laplacian_kernel(
    x: Tensor, y: Tensor | None = None, *, bandwidth: float | None = None
) -> Tensor:
    r"""Gram matrix of :math:`\kappa(x, y) = \exp(-\lVert x - y \rVert_1 / \sigma)`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.
        bandwidth: :math:`\sigma` > 0. Default: the median L1 distance over the pairs i < j
            of `x`, detached, one for each matrix of a batch; 1 if that is zero.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, the devices differ, or `bandwidth` <= 0.

    Example:
        >>> laplacian_kernel(torch.tensor([[0.0], [1.0]]), bandwidth=1.0)
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """
    dtype = check_samples(x, y)
    distances, sigma = _distances(x, y, p=1.0, bandwidth=bandwidth)
    return (-distances / sigma).exp().to(dtype)


def normalize_gram(gram: Tensor) -> Tensor:
    r"""Normalise a Gram matrix to constant diagonal and trace one (InfoSAM, Def. 1).

    .. math:: A_{ij} = \frac{1}{n} \frac{K_{ij}}{\sqrt{K_{ii} K_{jj}}}

    For a linear kernel this is the Gram matrix of the samples scaled to unit length. A zero sample
    (:math:`K_{ii} = 0`) counts as equal to other zero samples and orthogonal to the rest, the limit
    of adding a small constant to the kernel, and passes back a zero gradient.

    Args:
        gram: Gram matrix :math:`K`, shape `(..., n, n)`.

    Returns:
        :math:`A`, shape `(..., n, n)`, in the dtype of `gram`, at least float32.

    Raises:
        TypeError: `gram` is not a floating-point tensor.
        ValueError: `gram` is not square.

    Example:
        >>> normalize_gram(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[0.5000, 0.2500],
                [0.2500, 0.5000]])
    """
    check_gram("gram", gram)
    kernel = gram.double()
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    zero = diagonal == 0
    scale = torch.where(zero, 1.0, diagonal).rsqrt()
    # Def. 1 with 1 for a pair of zero samples and 0 for a pair of which one is zero. The kernel is
    # zero there, but for a NaN, which has to stay one.
    cosine = torch.where(
        zero.unsqueeze(-1) | zero.unsqueeze(-2),
        kernel.detach() + (zero.unsqueeze(-1) & zero.unsqueeze(-2)),
        kernel * scale.unsqueeze(-1) * scale.unsqueeze(-2),
    )
    return (cosine / gram.shape[-1]).to(compute_dtype(gram))


def sample_gram(samples: Tensor) -> Tensor:
    """Gram matrix of the linear kernel over a batch of feature maps, each flattened.

    Args:
        samples: shape `(B, ...)`, in any memory layout, read once and not copied if dense.

    Returns:
        Gram matrix, shape `(B, B)`, float64. It has no second derivative.
    """
    gram: Tensor = op(samples)
    return gram


def gram_by_blocks(samples: Tensor) -> Tensor:
    """As `sample_gram`, from one block after the other, copied if the dtype asks for it."""
    rows = in_memory_order(samples).flatten(1)
    batch = rows.shape[0]
    dtype = ieee_dtype(compute_dtype(samples), samples.device)
    if not is_long(rows):
        dtype = torch.float64
    columns = max(1, _BLOCK // batch // (batch if rows.dtype == dtype else _CHUNK)) * _CHUNK
    gram = rows.new_zeros(batch, batch, dtype=torch.float64)
    with torch.autocast(rows.device.type, enabled=False):
        for block in torch.split(rows, columns, dim=1):
            if dtype == torch.float32 and block.shape[1] % _CHUNK == 0:
                chunks = block.to(dtype).view(batch, -1, _CHUNK).transpose(0, 1)
                gram += (chunks @ chunks.mT).sum(dim=0, dtype=torch.float64)
            else:
                gram += block.double() @ block.double().mT
    return gram


op = torch.library.custom_op("renyi_kd::sample_gram", gram_by_blocks, mutates_args=())


@op.register_fake
def _(samples: Tensor) -> Tensor:
    return samples.new_empty(samples.shape[0], samples.shape[0], dtype=torch.float64)


@torch.library.custom_op("renyi_kd::sample_gram_backward", mutates_args=())
def _sample_gram_backward(grad: Tensor, samples: Tensor) -> Tensor:
    symmetric = grad + grad.mT
    rows = in_memory_order(samples).flatten(1)
    grad_samples = _dense_in_memory_order(samples)
    grad_rows = grad_samples.permute(0, *memory_order(samples)).flatten(1)
    columns = max(1, _BLOCK // rows.shape[0])
    blocks = (torch.split(x, columns, dim=1) for x in (rows, grad_rows))
    for block, grad_block in zip(*blocks, strict=True):
        grad_block.copy_(symmetric @ block.double())
    return grad_samples


@_sample_gram_backward.register_fake
def _(grad: Tensor, samples: Tensor) -> Tensor:
    return _dense_in_memory_order(samples)


def _save_samples(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    grad_samples: Tensor = _sample_gram_backward(grad, *ctx.saved_tensors)
    return grad_samples


op.register_autograd(_backward, setup_context=_save_samples)


def gram_error(samples: Tensor) -> float:
    """Relative rounding error of the entries of `sample_gram`."""
    chunked = samples.dtype != torch.float64 and samples.shape[1:].numel() >= _LONG
    return 1e-8 if chunked else torch.finfo(torch.float64).eps


def is_long(rows: Tensor) -> bool:
    """Whether rounding errors of float32 sums over chunks average out."""
    return rows.shape[1] >= _LONG


def in_memory_order(samples: Tensor) -> Tensor:
    """The same, with its axes in `memory_order`: a dense map flattens to a view."""
    return samples.permute(0, *memory_order(samples))


def memory_order(samples: Tensor) -> list[int]:
    """The axes of a sample from the slowest to the fastest."""
    return sorted(range(1, samples.ndim), key=samples.stride, reverse=True)


def _dense_in_memory_order(samples: Tensor) -> Tensor:
    """An empty tensor of the same shape, dense, with its axes in the order of `samples`."""
    axes = memory_order(samples)
    dense = samples.new_empty(samples.shape[0], *(samples.shape[axis] for axis in axes))
    return dense.permute(0, *(1 + axes.index(axis) for axis in range(1, samples.ndim)))


def check_samples(x: Tensor, y: Tensor | None = None) -> torch.dtype:
    """The dtype of a kernel's result, unless `x` and `y` are no samples that fit."""
    for name, samples in (("x", x),) if y is None else (("x", x), ("y", y)):
        check_floating(name, samples)
        if samples.ndim < 2 or 0 in samples.shape[-2:]:
            raise ValueError(
                f"`{name}` must have shape (..., n, d), one sample a row, "
                f"got {tuple(samples.shape)}. Flatten each sample first."
            )
    if y is None:
        return compute_dtype(x)
    check_same_device(x=x, y=y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"`y` must have samples of the dimension of `x`, {x.shape[-1]}, "
            f"got shape {tuple(y.shape)}."
        )
    check_batch_dimensions((x, y))
    return compute_dtype(x, y)


def inner_products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """As `linear_kernel`, in float64 and without checks."""
    x = x.double()  # once: backward keeps what it is given
    return x @ (x if y is None else y.double()).mT


def median_distance(x: Tensor, p: float) -> Tensor:
    """The default bandwidth: the median over the pairs of `x`, detached, shape `(..., 1, 1)`."""
    x = x.detach().double()
    return _median_over_pairs(distance(x, x, p))


def _distances(
    x: Tensor, y: Tensor | None, *, p: float, bandwidth: float | None
) -> tuple[Tensor, Tensor | float]:
    double = x.double()
    distances = distance(double, double if y is None else y.double(), p)
    if bandwidth is not None:
        return distances, check_real("bandwidth", bandwidth, minimum=0, exclusive=True)
    return distances, median_distance(x, p) if y is not None else _median_over_pairs(
        distances.detach()
    )


def distance(a: Tensor, b: Tensor, p: float) -> Tensor:
    """Distances in the norm of order `p`, shape `(..., n, m)`."""
    # |a|^2 + |b|^2 - 2ab would lose the digits of near-duplicate samples.
    return torch.cdist(a, b, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def _median_over_pairs(distances: Tensor) -> Tensor:
    n = distances.shape[-1]
    if n == 1:
        return distances.new_ones(())
    rows, columns = torch.triu_indices(n, n, offset=1, device=distances.device)
    pairs = distances[..., rows, columns].sort(dim=-1).values
    count = pairs.shape[-1]
    median = (pairs[..., (count - 1) // 2] + pairs[..., count // 2]) / 2
    return torch.where(median == 0, 1.0, median)[..., None, None]
