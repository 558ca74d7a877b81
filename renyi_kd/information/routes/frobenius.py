r"""Order 2 by the Frobenius norms of large Hadamard products, tile by tile (InfoSAM, Eq. 22).

.. math:: S_2(K_1, \dots, K_k) = -\log_2 \frac{\lVert K_1 \circ \dots \circ K_k \rVert_F^2}
    {(\operatorname{tr} K_1 \circ \dots \circ K_k)^2}

A joint entropy is named by the numbers of its matrices, its subset. One pass over the tiles, which
reads or evaluates each matrix once, collects the norms of all joints that are asked for. Nothing as
large as a matrix is written but the gradient of one that is given as a matrix.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import (
    first_derivative_only,
    gradients_by_operators,
    needs_plain_formulas,
)
from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import (
    Subset,
    gradient_of_factor,
    hadamard_product,
    signed_sum,
    sum_over_joints_by_operators,
)
from renyi_kd.information.products import upper_tiles
from renyi_kd.information.routes.tiles import (
    Evaluate,
    Progress,
    each_tile,
    gradients_of_samples,
    kernels_of,
    tiled_kernels,
)
from renyi_kd.information.samples import SampleGram

# The width of a tile of given matrices. On a CPU some and their products should fit into a core's
# cache; on a GPU each tile costs launches.
_WIDTH, _WIDTH_ON_GPU = 256, 4096


def sum_of_entropies_of_matrices(
    grams: Sequence[Tensor], signs: Sequence[int], subsets: Sequence[Subset]
) -> Tensor:
    """Return a sum of joint entropies of order 2 of Gram matrices, each times its sign.

    Args:
        grams: positive semi-definite, all of one shape `(..., n, n)`. The symmetric part of each is
            taken.
        signs: of the entropies.
        subsets: for each entropy the numbers of the matrices it is of.

    Returns:
        The sum in bits, float64, shape `(...)`. It has second derivatives.
    """
    total: Tensor = _SumOfEntropies.apply(signs, subsets, *grams)
    return total


def entropies_of_samples(
    grams: Sequence[SampleGram], subsets: Sequence[Subset], progress: Progress | None
) -> Tensor:
    """Return joint entropies of order 2 of kernels of many samples.

    Args:
        grams: of the same number of samples; leading dimensions broadcast.
        subsets: for each entropy the numbers of the kernels it is of.
        progress: see `renyi_entropy`.

    Returns:
        Entropies in bits, float64, shape `(len(subsets), ...)`. They have no second derivative.
    """
    matrices, diagonals = tiled_kernels(grams)
    evaluate = [matrix.evaluate for matrix in matrices]
    norms = _NormsOfSamples.apply(
        subsets, evaluate, progress, *(matrix.samples for matrix in matrices)
    )
    traces = [hadamard_product(diagonals, subset).sum(dim=-1) for subset in subsets]
    entropies: Tensor = -(norms / torch.stack(traces).square()).log2()
    return entropies


def _squared_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the squares of the entries, in float64, shape `(...)`."""
    total: Tensor = matrix.square().sum(dim=-1).sum(dim=-1, dtype=torch.float64)
    return total


class _NormsOfSamples(torch.autograd.Function):
    """The squared norms of Hadamard products of matrices made from samples."""

    @staticmethod
    def forward(
        ctx: Any,
        subsets: Sequence[Subset],
        evaluate: Sequence[Evaluate],
        progress: Progress | None,
        *samples: Tensor,
    ) -> Tensor:
        ctx.subsets, ctx.evaluate, ctx.progress = subsets, evaluate, progress
        ctx.save_for_backward(*samples)
        norms = samples[0].new_zeros(len(subsets), *samples[0].shape[:-2])
        for i, j, tiles in each_tile(kernels_of(samples, evaluate), progress):
            of_tile = [_squared_norm(hadamard_product(tiles, subset)) for subset in subsets]
            norms += (1 if i == j else 2) * torch.stack(of_tile)
        return norms

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_norms: Tensor) -> tuple[Tensor | None, ...]:
        def gradients_of_entries(
            tiles: list[Tensor], i: slice, j: slice, wanted: list[int]
        ) -> list[Tensor]:
            slopes = list((2 if i == j else 4) * grad_norms[..., None, None])
            squares = [tile.square() for tile in tiles]
            return [tiles[v] * gradient_of_factor(v, squares, ctx.subsets, slopes) for v in wanted]

        matrices = kernels_of(ctx.saved_tensors, ctx.evaluate)
        needed = ctx.needs_input_grad[3:]
        gradients = gradients_of_samples(matrices, gradients_of_entries, needed, ctx.progress)
        return None, None, None, *gradients


class _SumOfEntropies(torch.autograd.Function):
    """The sum of joint entropies of given matrices, each times its sign."""

    @staticmethod
    def forward(
        ctx: Any, signs: Sequence[int], subsets: Sequence[Subset], *grams: Tensor
    ) -> Tensor:
        scaled = _ScaledGrams(grams, _dtype_of_entries(grams))
        norms: list[list[Tensor]] = [[] for _ in subsets]
        for i, j, tiles in _tiles(scaled, grams):
            for parts, subset in zip(norms, subsets, strict=True):
                norm = _squared_norm(hadamard_product(tiles, subset))
                parts.append(norm if i == j else 2 * norm)
        ctx.norms = [reduce(add, parts) for parts in norms]
        diagonals = scaled.diagonals(grams)
        ctx.traces = [
            hadamard_product(diagonals, subset).sum(dim=-1, dtype=torch.float64)
            for subset in subsets
        ]
        ctx.signs, ctx.subsets, ctx.scaled = signs, subsets, scaled
        ctx.save_for_backward(*grams)
        pairs = zip(ctx.norms, ctx.traces, strict=True)
        return signed_sum(signs, ((trace.square() / norm).log2() for norm, trace in pairs))

    @staticmethod
    def backward(ctx: Any, grad_bits: Tensor) -> tuple[Tensor | None, ...]:
        grams, subsets, scaled = ctx.saved_tensors, ctx.subsets, ctx.scaled
        wanted = [v for v, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if torch.is_grad_enabled() or needs_plain_formulas(grad_bits):
            plain = partial(sum_over_joints_by_operators, ctx.signs, subsets, _entropy_by_operators)
            return None, None, *gradients_by_operators(plain, grams, grad_bits)
        slopes = [grad_bits * (2 * sign / math.log(2)) for sign in ctx.signs]
        # By halves of squared norms, whose derivative is the matrix itself; and by traces.
        of_norms = [-slope / norm for slope, norm in zip(slopes, ctx.norms, strict=True)]
        of_traces = [slope / trace for slope, trace in zip(slopes, ctx.traces, strict=True)]
        of_norms, of_traces = (
            [x[..., None, None].to(scaled.dtype) for x in slopes]
            for slopes in (of_norms, of_traces)
        )
        gradients: dict[int, Tensor] = {}
        for i, j, tiles in _tiles(scaled, grams):
            squares = [tile.square() for tile in tiles] if len(tiles) > 1 else tiles
            for v in wanted:
                scaled_slopes = [slope * scaled.scales[v] for slope in of_norms]
                of_tile = tiles[v] * gradient_of_factor(v, squares, subsets, scaled_slopes)
                if of_tile.shape == grams[v].shape:
                    gradients[v] = of_tile.to(grams[v].dtype)
                    continue
                if v not in gradients:
                    gradients[v] = torch.empty_like(grams[v])
                gradients[v][..., i, j] = of_tile
                if i != j:
                    gradients[v][..., j, i] = of_tile.mT
        diagonals = scaled.diagonals(grams)
        for v in wanted:
            scaled_slopes = [(slope * scaled.scales[v])[..., 0] for slope in of_traces]
            of_diagonal = gradient_of_factor(v, diagonals, subsets, scaled_slopes)
            gradients[v].diagonal(dim1=-2, dim2=-1).add_(of_diagonal)
        return None, None, *(gradients.get(v) for v in range(len(grams)))


class _ScaledGrams:
    """How Gram matrices of one shape `(..., n, n)` are made symmetric, scaled and shifted.

    Scale and shift are constants, on whose choice no entropy depends. The scale makes each trace n,
    which keeps products within range. The shift makes a zero matrix one of equal entries, which is
    the limit of adding a constant.

    Args:
        grams: the matrices.
        dtype: of the entries that are returned.
    """

    def __init__(self, grams: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        diagonals = [gram.diagonal(dim1=-2, dim2=-1) for gram in grams]
        traces = torch.stack([x.sum(dim=-1, dtype=torch.float64) for x in diagonals])
        zero = traces == 0
        scales = (grams[0].shape[-1] / traces.masked_fill(zero, math.inf)).to(dtype)
        self.scales = scales[..., None, None].unbind()
        self.shifts = zero.to(dtype)[..., None, None].unbind()
        self.whole: list[Tensor] = []  # the matrices, if they are small

    def of(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return scaled entries of each matrix, given its sum with its transpose, overwritten."""
        entries = [twice.to(self.dtype) for twice in sums]
        for twice, scale, shift in zip(entries, self.scales, self.shifts, strict=True):
            torch.addcmul(shift, twice, scale, value=0.5, out=twice)
        return entries

    def diagonals(self, grams: Sequence[Tensor]) -> list[Tensor]:
        """Return the scaled diagonals, shape `(..., n)` each."""
        diagonals = [gram.diagonal(dim1=-2, dim2=-1).to(self.dtype) for gram in grams]
        return [
            torch.addcmul(shift[..., 0], diagonal, scale[..., 0])
            for diagonal, scale, shift in zip(diagonals, self.scales, self.shifts, strict=True)
        ]


def _dtype_of_entries(grams: Sequence[Tensor]) -> torch.dtype:
    """Return float32 for float32 matrices whose products stay within its range."""
    # A product of squares is at most n to this power, and so is one over it.
    in_range = grams[0].shape[-1] ** (2 * len(grams)) < 2.0**100
    return compute_dtype(*grams) if in_range else torch.float64


def _tiles(
    scaled: _ScaledGrams, grams: Sequence[Tensor]
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield rows and columns of each upper tile, and the entries of each matrix there."""
    n, width = grams[0].shape[-1], _WIDTH if grams[0].is_cpu else _WIDTH_ON_GPU
    if n <= width:
        scaled.whole = scaled.whole or scaled.of([gram + gram.mT for gram in grams])
        yield slice(0, n), slice(0, n), scaled.whole
        return
    for i, j in upper_tiles(n, width):
        yield i, j, scaled.of([gram[..., i, j] + gram[..., j, i].mT for gram in grams])


def _entropy_by_operators(joint: Tensor) -> Tensor:
    return -joint.square().sum(dim=(-2, -1)).log2()
