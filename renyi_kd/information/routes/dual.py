r"""Linear kernels with fewer dimensions than samples, by their d x d matrix.

:math:`Z^\top Z` has the nonzero eigenvalues of :math:`Z Z^\top`, the Gram matrix of the linear
kernel. The joint of several linear kernels is itself one: that of the samples whose coordinates are
all products of one coordinate of each variable (their Kronecker product).
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import linear_kernel, trace_one
from renyi_kd.information.samples import SampleGram


def has_dual(grams: Sequence[SampleGram]) -> bool:
    """Return whether all kernels are linear, with a product of dimensions below n."""
    linear = all(gram.kernel is linear_kernel for gram in grams)
    return linear and math.prod([gram.x.shape[-1] for gram in grams]) < grams[0].shape[-1]


def dual_matrix(grams: Sequence[SampleGram]) -> Tensor:
    """Return a matrix with the nonzero eigenvalues of the joint Gram matrix of linear kernels.

    Args:
        grams: linear kernels of the same n samples, whose dimensions have the product D.

    Returns:
        The matrix of trace one, float64, shape `(..., D, D)`. Of near-duplicate samples its first
        entry is nearly one, and all other entries hold the differences between them.
    """
    factors = [_of_largest_entry_one(gram.x.double()) for gram in grams]
    z = reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)
    z = _with_mean_along_first_axis(z)
    return trace_one(z.mT @ z)


def order_2_entropy_of_dual(dual: Tensor) -> Tensor:
    r"""Return the entropy of order 2 of a `dual_matrix`, in bits, shape `(...)`.

    It is the logarithm of :math:`1 - (1 - \lVert A \rVert_F^2)`, whose inner difference is formed
    as the sum of :math:`A_{aa} A_{bb} - A_{ab}^2` over :math:`a \ne b`. So no digits cancel where
    the first entry is nearly one.
    """
    diagonal = dual.diagonal(dim1=-2, dim2=-1)
    first, rest = diagonal[..., 0], diagonal[..., 1:]
    products_of_diagonal = first * rest.sum(dim=-1) + (rest * (1 - rest)).sum(dim=-1)
    squares_off_diagonal = (dual - torch.diag_embed(diagonal)).square().sum(dim=(-2, -1))
    one_minus_squared_norm = products_of_diagonal - squares_off_diagonal
    return -(-one_minus_squared_norm).log1p() / math.log(2)


def dual_error(grams: Sequence[SampleGram]) -> float:
    """Return the relative rounding error of the entries of `dual_matrix`.

    Rounding the samples by a relative error turns singular values of zero into ones of its size,
    and so eigenvalues of zero, which are their squares, into ones of the size of its square.
    """
    of_samples = torch.finfo(compute_dtype(*grams)).eps ** 2
    return max(of_samples, torch.finfo(torch.float64).eps)


def _of_largest_entry_one(x: Tensor) -> Tensor:
    """Return the samples divided by their largest entry, which is a constant.

    Samples that are all zero become ones. They are all equal then and share no information, which
    is the limit of adding a constant to their kernel.
    """
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest == 0, 1.0, x / torch.where(largest == 0, 1.0, largest))


def _with_mean_along_first_axis(z: Tensor) -> Tensor:
    """Return the samples, reflected so that their mean lies along the first axis.

    A reflection does not change the spectrum. But of near-duplicate samples the other axes then
    hold nothing but their differences.
    """
    mean = z.detach().mean(dim=-2, keepdim=True)
    first_axis = torch.zeros_like(mean)
    first_axis[..., 0] = 1.0
    length = mean.norm(dim=-1, keepdim=True)
    normal = mean + first_axis * length.copysign(mean[..., :1])
    square = normal.square().sum(dim=-1, keepdim=True)
    reflected: Tensor = z - (z @ normal.mT) * (normal * (2 / torch.where(square == 0, 1.0, square)))
    return reflected
