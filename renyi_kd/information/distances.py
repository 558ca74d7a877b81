"""Distances between samples, one by one, and their median."""

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import exact_dtype


def distances(x: Tensor, y: Tensor, order: float) -> Tensor:
    """Return the distances between samples in the norm of this order, shape `(..., n, m)`."""
    if needs_plain_formulas(x, y):
        return _distances_by_operators(x, y, order)
    # By default cdist expands |x - y|^2 to |x|^2 - 2xy + |y|^2, which cancels the digits of
    # near-duplicate samples.
    return torch.cdist(x, y, p=order, compute_mode="donot_use_mm_for_euclid_dist")


def _distances_by_operators(x: Tensor, y: Tensor, order: float) -> Tensor:
    """Do what `distances` does, by operators that have all derivatives. Those of cdist are few."""
    differences = x.unsqueeze(-2) - y.unsqueeze(-3)
    if order == 1:
        return differences.abs().sum(dim=-1)
    squares = differences.square().sum(dim=-1)
    # The slope of a root is infinite at zero. As in cdist it counts as zero there.
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def median_distance(x: Tensor, order: float) -> Tensor:
    """Return the bandwidth that kernels use by default, detached, shape `(..., 1, 1)` or `()`.

    It is the median distance over all pairs of different samples, and 1 if that is zero or there
    is no pair.
    """
    x = x.detach().to(exact_dtype(x.device))
    return median_over_pairs(distances(x, x, order))


def median_over_pairs(between: Tensor) -> Tensor:
    """Do what `median_distance` does, given all distances between the samples."""
    n = between.shape[-1]
    if n == 1:
        return between.new_ones(())
    if torch.compiler.is_compiling():
        # Indices would make n constant. So all entries are sorted: n zeros of the diagonal, and
        # each pair twice, whose median is between the two in the middle.
        entries = between.flatten(-2).sort(dim=-1).values
        middle = torch.arange(2, device=between.device) + (n + n * (n - 1) // 2 - 1)
        median = entries.index_select(-1, middle).mean(dim=-1)
    else:
        rows, columns = torch.triu_indices(n, n, offset=1, device=between.device)
        pairs = between[..., rows, columns].sort(dim=-1).values
        count = pairs.shape[-1]
        median = (pairs[..., (count - 1) // 2] + pairs[..., count // 2]) / 2
    return torch.where(median == 0, 1.0, median)[..., None, None]
