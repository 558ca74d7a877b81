"""Kernels, and Gram matrices divided by their trace (InfoSAM, Def. 1, Eq. 19 and 20).

The arithmetic is in float64, except that the RBF kernel of float32 samples is made by one product
of float32 matrices. Neither autocast nor `torch.set_float32_matmul_precision` touches the digits,
forward or backward. What is returned has the promoted dtype of the arguments, at least float32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce, wraps
from operator import mul
from typing import Any, TypeAlias

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
from renyi_kd._precision import compute_dtype, exact_dtype
from renyi_kd.information.distances import distances, median_distance, median_over_pairs
from renyi_kd.information.rbf import rbf_gram, scaled_samples

Bandwidth: TypeAlias = float | Tensor
# The numbers of the matrices whose joint is meant.
Subset: TypeAlias = tuple[int, ...]


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
        >>> import torch
        >>> from renyi_kd import linear_kernel
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
        >>> import torch
        >>> from renyi_kd import polynomial_kernel
        >>> polynomial_kernel(torch.tensor([[1.0], [2.0]]), degree=2)
        tensor([[ 4.,  9.],
                [ 9., 25.]])
    """
    dtype = check_samples(x, y)
    degree = check_integer("degree", degree, minimum=1)
    offset = check_real("offset", offset, minimum=0)
    return ((inner_products(x, y) + offset) ** degree).to(dtype)


def rbf_kernel(x: Tensor, y: Tensor | None = None, *, bandwidth: Bandwidth | None = None) -> Tensor:
    r"""Gram matrix of :math:`\kappa(x, y) = \exp(-\lVert x - y \rVert_2^2 / (2 \sigma^2))`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.
        bandwidth: :math:`\sigma` > 0, a number or a tensor of shape `()` or `(..., 1, 1)`, which
            may learn and whose values are not checked. Default: the median Euclidean distance over
            the pairs i < j of `x`, detached, one for each matrix of a batch; 1 if that is zero.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, the devices differ, or `bandwidth` <= 0.

    Note:
        Without `y`, float32 samples have their squared distances by one product of matrices, with
        an error of some 1e-7 of the larger squared distance from the bulk of the samples. For
        near-duplicates, and for samples many bandwidths apart, give float64 samples, whose
        distances are taken one by one.

    Example:
        >>> import torch
        >>> from renyi_kd import rbf_kernel
        >>> rbf_kernel(torch.tensor([[0.0], [1.0]]), bandwidth=1.0)
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    dtype = check_samples(x, y)
    bandwidth = check_bandwidth(x, bandwidth)
    if bandwidth is None:
        bandwidth = median_distance(x, order=2.0)
    if y is None:
        by_product = dtype == torch.float32
        scaled = scaled_samples(x.to(dtype), bandwidth, by_product=by_product)
        return rbf_gram(scaled, by_product=by_product)
    between = _exact_distances(x, y, order=2.0) / bandwidth
    return (between.square() / -2).exp().to(dtype)


def laplacian_kernel(
    x: Tensor, y: Tensor | None = None, *, bandwidth: Bandwidth | None = None
) -> Tensor:
    r"""Gram matrix of :math:`\kappa(x, y) = \exp(-\lVert x - y \rVert_1 / \sigma)`.

    Args:
        x: samples, one a row, shape `(..., n, d)`.
        y: other samples, shape `(..., m, d)`. Default: `x`.
        bandwidth: :math:`\sigma` > 0, a number or a tensor of shape `()` or `(..., 1, 1)`, which
            may learn and whose values are not checked. Default: the median L1 distance over the
            pairs i < j of `x`, detached, one for each matrix of a batch; 1 if that is zero.

    Returns:
        Gram matrix, shape `(..., n, m)`, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, the devices differ, or `bandwidth` <= 0.

    Example:
        >>> import torch
        >>> from renyi_kd import laplacian_kernel
        >>> laplacian_kernel(torch.tensor([[0.0], [1.0]]), bandwidth=1.0)
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """
    dtype = check_samples(x, y)
    bandwidth = check_bandwidth(x, bandwidth)
    between = _exact_distances(x, x if y is None else y, order=1.0)
    if bandwidth is None:
        # The median is over the pairs of x. Without y their distances are already known.
        known = y is None
        bandwidth = median_over_pairs(between.detach()) if known else median_distance(x, order=1.0)
    return (-between / bandwidth).exp().to(dtype)


def label_kernel(labels: Tensor, other: Tensor | None = None) -> Tensor:
    """Gram matrix of class labels: 1 where two are equal, else 0.

    Args:
        labels: of an integer dtype or bool, shape `(..., n)`.
        other: other labels, shape `(..., m)`. Default: `labels`.

    Returns:
        Gram matrix, shape `(..., n, m)`, float32.

    Raises:
        TypeError: labels are not a tensor of integers.
        ValueError: the shapes do not fit, or the devices differ.

    Note:
        Below order 1, the rounding that is assumed of float32 entries is that of the joint, too.
        Beside float64 matrices convert this one, which loses nothing, by `.double()`.

    Example:
        >>> import torch
        >>> from renyi_kd import label_kernel, renyi_entropy
        >>> renyi_entropy(label_kernel(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])))
        tensor(2.)
    """
    other = labels if other is None else other
    for name, value in (("labels", labels), ("other", other)):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"`{name}` must be a tensor of integers, got {found}. Convert class labels by "
                f"`.long()`; for numbers use rbf_kernel."
            )
        if value.ndim == 0 or value.shape[-1] == 0:
            raise ValueError(f"`{name}` must have shape (..., n), got {tuple(value.shape)}.")
    check_same_device(labels=labels, other=other)
    check_batch_dimensions((labels.unsqueeze(-1), other.unsqueeze(-2)))
    return (labels.unsqueeze(-1) == other.unsqueeze(-2)).float()


def normalized_kernel(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel divided by the lengths of its two samples, as `normalize_gram` does it.

    Each entry is made of its own two samples, so that it may be evaluated tile by tile. Zero
    samples are equal to each other and orthogonal to the rest.
    """

    @wraps(kernel)
    def normalized(x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        def squared_lengths(samples: Tensor) -> Tensor:
            each = samples.unsqueeze(-2)
            return kernel(each, each, **options)[..., 0, 0]

        of_x = squared_lengths(x)
        of_y = of_x if y is None else squared_lengths(y)
        return _divided_by_lengths(kernel(x, y, **options), of_x, of_y)

    return normalized


def normalize_gram(gram: Tensor) -> Tensor:
    r"""Normalise a Gram matrix to constant diagonal and trace one (InfoSAM, Def. 1).

    .. math:: A_{ij} = \frac{1}{n} \frac{K_{ij}}{\sqrt{K_{ii} K_{jj}}}

    For a linear kernel this is the Gram matrix of the samples after each is scaled to unit length.

    A zero sample (:math:`K_{ii} = 0`) has no direction. It counts as equal to other zero samples
    and orthogonal to all the rest, which is the limit of adding a small constant to the kernel. It
    passes back a gradient of zero.

    Args:
        gram: Gram matrix :math:`K`, shape `(..., n, n)`.

    Returns:
        :math:`A`, shape `(..., n, n)`, in the dtype of `gram`, at least float32.

    Raises:
        TypeError: `gram` is not a floating-point tensor.
        ValueError: `gram` is not square.

    Example:
        >>> import torch
        >>> from renyi_kd import normalize_gram
        >>> normalize_gram(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[0.5000, 0.2500],
                [0.2500, 0.5000]])
    """
    check_gram("gram", gram)
    kernel = gram.to(exact_dtype(gram.device))
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    cosines = _divided_by_lengths(kernel, diagonal, diagonal)
    return (cosines / gram.shape[-1]).to(compute_dtype(gram))


def _divided_by_lengths(gram: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """Return each entry divided by the lengths of its two samples, of these squares."""
    zero_x, zero_y = (of_x == 0).unsqueeze(-1), (of_y == 0).unsqueeze(-2)
    inverse_x = torch.where(of_x == 0, 1.0, of_x).rsqrt().unsqueeze(-1)
    inverse_y = torch.where(of_y == 0, 1.0, of_y).rsqrt().unsqueeze(-2)
    # The entry of a zero sample is zero. It is added here so that a NaN stays NaN.
    of_zero = gram.detach() + (zero_x & zero_y)
    return torch.where(zero_x | zero_y, of_zero, gram * inverse_x * inverse_y)


def trace_one(gram: Tensor) -> Tensor:
    """Return the symmetric part of `gram` divided by its trace, in float64.

    A zero matrix has no trace to divide by. It becomes the matrix of equal entries, which is the
    limit of adding a constant to the kernel.
    """
    gram = gram.double()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    zero = (gram == 0).all(dim=-1).all(dim=-1)[..., None, None]
    symmetric = (gram + gram.mT) / (2 * torch.where(zero, 1.0, trace))
    return torch.where(zero, 1 / gram.shape[-1], symmetric)


def inverse_trace(trace: Tensor) -> Tensor:
    """Return 1 / `trace`; and 1 for a zero matrix, which stays zero if it is multiplied by that."""
    return 1 / torch.where(trace == 0, 1.0, trace)


def hadamard_product(values: Sequence[Tensor], subset: Iterable[int]) -> Tensor:
    """Return the entrywise product of the values with these numbers."""
    return reduce(mul, (values[number] for number in subset))


def signed_sum(signs: Iterable[int], values: Iterable[Tensor]) -> Tensor:
    """Return the sum of the values, each times its sign."""
    total: Tensor | None = None
    for sign, value in zip(signs, values, strict=True):
        if total is None:
            total = value if sign == 1 else sign * value
        else:
            total = torch.add(total, value, alpha=sign)
    assert total is not None
    return total


def gradient_of_factor(
    v: int, factors: Sequence[Tensor], subsets: Sequence[Subset], gradients: Sequence[Tensor]
) -> Tensor:
    """Return the gradient of factor `v`, from those of the Hadamard products over `subsets`."""
    total: Tensor | None = None
    for gradient, subset in zip(gradients, subsets, strict=True):
        others = [u for u in subset if u != v]
        if v not in subset:
            continue
        if not others:
            total = gradient if total is None else total + gradient
        elif total is None:
            total = hadamard_product(factors, others) * gradient
        else:
            total = torch.addcmul(total, hadamard_product(factors, others), gradient)
    assert total is not None
    return total


def joint_gram(grams: Sequence[Tensor]) -> Tensor:
    """Return the Hadamard product of Gram matrices, of trace one, in float64 (Eq. 2 and 16)."""
    joint = reduce(mul, map(trace_one, grams))
    return joint if len(grams) == 1 else trace_one(joint)


def sum_over_joints_by_operators(
    signs: Iterable[int],
    subsets: Iterable[Subset],
    entropy: Callable[[Tensor], Tensor],
    *grams: Tensor,
) -> Tensor:
    """Return the sum of the entropies of joint Gram matrices, by PyTorch's own operators."""
    joints = (joint_gram([grams[v] for v in subset]) for subset in subsets)
    return signed_sum(signs, map(entropy, joints))


def inner_products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return what `linear_kernel` does, in float64 and without checks."""
    dtype = exact_dtype(x.device)
    x = x.to(dtype)  # converted once, so that backward keeps one copy of it and not two
    return x @ (x if y is None else y.to(dtype)).mT


def check_samples(x: Tensor, y: Tensor | None = None) -> torch.dtype:
    """Return the dtype of a kernel's result. Raise unless `x` and `y` are samples that fit."""
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


def check_bandwidth(x: Tensor, bandwidth: Bandwidth | None) -> Bandwidth | None:
    """Return `bandwidth`, a number as a float. Raise unless it can be one for the samples `x`."""
    if bandwidth is None:
        return None
    if not isinstance(bandwidth, Tensor):
        return check_real("bandwidth", bandwidth, minimum=0, exclusive=True)
    if not bandwidth.is_floating_point():
        raise TypeError(
            f"`bandwidth` must have a floating-point dtype, got {bandwidth.dtype}. "
            f"Convert it by `.float()`."
        )
    check_floating("bandwidth", bandwidth)
    if bandwidth.ndim and bandwidth.shape[-2:] != (1, 1):
        raise ValueError(
            f"`bandwidth` must be a number, or a tensor of shape () or (..., 1, 1), one for "
            f"each matrix of a batch, got shape {tuple(bandwidth.shape)}."
        )
    check_same_device(x=x, bandwidth=bandwidth)
    check_batch_dimensions((x, bandwidth))
    return bandwidth


def _exact_distances(x: Tensor, y: Tensor, order: float) -> Tensor:
    dtype = exact_dtype(x.device)
    return distances(x.to(dtype), y.to(dtype), order)
