"""Sums over the tiles of matrices that are made from samples, and again in backward.

Memory is that of the samples and of a few tiles, whatever the number of samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from renyi_kd._autograd import first_derivative_only
from renyi_kd.information.routes.frobenius import (
    Subset,
    entropies_from_norms,
    joint,
    norm_gradients,
    squared_norms,
    tiles_of_triangle,
)
from renyi_kd.information.samples import Matrix, SampleGram

_TILE, _TILE_ON_GPU = 512, 4096

Progress: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]


def streamed_entropies(
    grams: Sequence[SampleGram], subsets: Sequence[Subset], progress: Progress | None
) -> Tensor:
    """Entropies of order 2 of kernels of many samples and of their joints.

    Args:
        grams: all of one shape `(..., n, n)`.
        subsets: for each entropy the indices of the kernels whose joint it is of.
        progress: see `renyi_entropy`.

    Returns:
        Entropies in bits, float64, shape `(len(subsets), ...)`. They have no second derivative.
    """
    tiles = [gram.tiles() for gram in grams]
    norms = _StreamedNorms.apply(subsets, [x.evaluate for x in tiles], progress, *ends_of(tiles))
    diagonals = [x.diagonal for x in tiles]
    traces = torch.stack([joint(diagonals, subset).sum(dim=-1) for subset in subsets])
    return entropies_from_norms(norms, traces)


class _StreamedNorms(torch.autograd.Function):
    """Squared Frobenius norms of the joints."""

    @staticmethod
    def forward(
        ctx: Any,
        subsets: Sequence[Subset],
        evaluate: Sequence[Callable[[Tensor, Tensor], Tensor]],
        progress: Progress | None,
        *ends: Tensor,
    ) -> Tensor:
        ctx.subsets, ctx.evaluate, ctx.progress = subsets, evaluate, progress
        ctx.save_for_backward(*ends)
        norms = ends[0].new_zeros(len(subsets), *ends[0].shape[:-2])
        for i, j, entries in each_tile(assemble(evaluate, ends), progress):
            norms += (1 if i == j else 2) * squared_norms(entries, subsets)
        return norms

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, of_norms: Tensor) -> tuple[Tensor | None, ...]:
        def of_entries(entries: list[Tensor], i: slice, j: slice, v: list[int]) -> list[Tensor]:
            weighted = of_norms if i == j else 2 * of_norms
            return list(norm_gradients(entries, ctx.subsets, weighted, v).values())

        matrices = assemble(ctx.evaluate, ctx.saved_tensors)
        gradients = pull_back(matrices, of_entries, ctx.needs_input_grad[3:], ctx.progress)
        return None, None, None, *gradients


def ends_of(matrices: Sequence[Matrix]) -> list[Tensor]:
    """Rows and columns of each matrix in turn."""
    return [end for matrix in matrices for end in (matrix.rows, matrix.columns)]


def assemble(
    evaluate: Sequence[Callable[[Tensor, Tensor], Tensor]], ends: Sequence[Tensor]
) -> list[Matrix]:
    """The matrices with these `ends_of` them."""
    return [Matrix(*of) for of in zip(ends[::2], ends[1::2], evaluate, strict=True)]


def each_tile(
    matrices: Sequence[Matrix], progress: Progress | None
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Rows, columns, and the entries of all matrices there, for each tile of the triangle."""
    for i, j in _tiles(matrices, progress):
        yield i, j, [matrix[i, j] for matrix in matrices]


def pull_back(
    matrices: Sequence[Matrix],
    of_entries: Callable[[list[Tensor], slice, slice, list[int]], list[Tensor]],
    needed: Sequence[bool],
    progress: Progress | None,
) -> list[Tensor | None]:
    """Gradients of the rows and columns of the matrices, from those of their entries.

    Args:
        matrices: to be evaluated tile by tile once more.
        of_entries: called with the entries of all matrices, the rows and columns they are at, and
            the indices of the matrices whose entries' gradients it has to return.
        needed: for each matrix whether its rows and whether its columns need a gradient.
        progress: see `renyi_entropy`.
    """
    ends = ends_of(matrices)
    gradients = [torch.zeros_like(x) if y else None for x, y in zip(ends, needed, strict=True)]
    wanted = [v for v in range(len(matrices)) if any(needed[2 * v : 2 * v + 2])]
    for i, j in _tiles(matrices, progress):
        leaves = [
            end[..., slice_, :].detach().clone().requires_grad_(need)
            for end, slice_, need in zip(ends, [i, j] * len(matrices), needed, strict=True)
        ]
        with torch.enable_grad():
            tiles = zip(matrices, leaves[::2], leaves[1::2], strict=True)
            entries = [matrix.evaluate(rows, columns) for matrix, rows, columns in tiles]
        of_wanted = of_entries([entry.detach() for entry in entries], i, j, wanted)
        of_leaves = torch.autograd.grad(
            [entries[v] for v in wanted],
            [leaf for leaf in leaves if leaf.requires_grad],
            of_wanted,
            materialize_grads=True,
        )
        slices = [x for x, needs in zip([i, j] * len(matrices), needed, strict=True) if needs]
        sums = [x for x in gradients if x is not None]
        for gradient, slice_, of_leaf in zip(sums, slices, of_leaves, strict=True):
            gradient[..., slice_, :] += of_leaf
    return gradients


def _tiles(matrices: Sequence[Matrix], progress: Progress | None) -> Iterable[tuple[slice, slice]]:
    rows = matrices[0].rows
    # On a CPU small enough for the cache, on a GPU large enough to fill it.
    size = _TILE if rows.device.type == "cpu" else _TILE_ON_GPU
    tiles = tiles_of_triangle(rows.shape[-2], size)
    return tiles if progress is None else progress(tiles)
