"""Kernels of samples evaluated tile by tile, in forward and again in backward.

The matrix never exists as a whole. Each tile is evaluated when its turn comes, and once more for
backward, so that memory is that of the samples and a few tiles. Gram matrices are symmetric, so the
tiles on and above the diagonal stand for those below it too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from renyi_kd.information.distances import distances
from renyi_kd.information.kernels import inverse_trace, laplacian_kernel, rbf_kernel
from renyi_kd.information.products import Tile, upper_tiles
from renyi_kd.information.rbf import exponentials, rbf_by_operators, scaled_samples
from renyi_kd.information.samples import SampleGram

Evaluate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Progress: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]

# The width of a tile. On a CPU it should fit into the cache, on a GPU it should keep all of it
# busy.
_WIDTH, _WIDTH_ON_GPU = 512, 4096


def check_progress(progress: object) -> None:
    """Raise `TypeError` unless `progress` is None or callable."""
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be callable, such as tqdm.tqdm, got {type(progress).__name__}."
        )


@dataclass(frozen=True)
class TiledKernel:
    """A kernel of samples, shape `(..., n, d)`, whose rows i and columns j are `kernel[i, j]`."""

    samples: Tensor
    evaluate: Evaluate

    def __getitem__(self, tile: Tile) -> Tensor:
        i, j = tile
        return self.evaluate(self.samples[..., i, :], self.samples[..., j, :])


def tiled_kernels(grams: Sequence[SampleGram]) -> tuple[list[TiledKernel], list[Tensor]]:
    """Return kernels to be evaluated tile by tile, and their diagonals of shape `(..., n)`.

    The matrices are in float64 and of one shape: leading dimensions are broadcast. Each is
    multiplied by a constant, on which no entropy depends. A zero matrix becomes one of equal
    entries.

    Raises:
        ValueError: a `bandwidth` is not given, for more than 8192 samples.
    """
    shapes = [gram.shape[:-2] for gram in grams]
    batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    pairs = []
    for gram in grams:
        if gram.shape[:-2] != batch:
            x = gram.x.expand(*batch, *gram.x.shape[-2:])
            gram = SampleGram(x, gram.kernel, **gram.kernel_options)
        pairs.append(_tiled_kernel(gram))
    return [matrix for matrix, _ in pairs], [diagonal for _, diagonal in pairs]


def tiles_of(matrices: Sequence[TiledKernel], progress: Progress | None) -> Iterable[Tile]:
    """Return the upper tiles of matrices of one shape, through `progress` if there is one."""
    samples = matrices[0].samples
    tiles = upper_tiles(samples.shape[-2], _WIDTH if samples.is_cpu else _WIDTH_ON_GPU)
    return tiles if progress is None else progress(tiles)


def each_tile(
    matrices: Sequence[TiledKernel], progress: Progress | None
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield the rows and the columns of each upper tile, and all matrices' entries there."""
    for i, j in tiles_of(matrices, progress):
        yield i, j, [matrix[i, j] for matrix in matrices]


def kernels_of(samples: Sequence[Tensor], evaluate: Sequence[Evaluate]) -> list[TiledKernel]:
    """Put kernels together from their parts.

    PyTorch follows gradients to an autograd function's arguments only if they are tensors. So the
    functions that go through kernels take their samples, and call this inside.
    """
    return [TiledKernel(*parts) for parts in zip(samples, evaluate, strict=True)]


def gradients_of_samples(
    matrices: Sequence[TiledKernel],
    gradients_of_entries: Callable[[list[Tensor], slice, slice, list[int]], list[Tensor]],
    needed: Sequence[bool],
    progress: Progress | None,
) -> list[Tensor | None]:
    """Return the gradients of the matrices' samples, from those of their entries.

    Args:
        matrices: to be evaluated tile by tile once more.
        gradients_of_entries: is called for each tile with the entries of all matrices, the tile's
            rows and columns, and the numbers of the matrices whose gradients it has to return.
        needed: the samples of which matrices need a gradient. The others get None.
        progress: see `renyi_entropy`.
    """
    wanted = [v for v, need in enumerate(needed) if need]
    totals = {v: torch.zeros_like(matrices[v].samples) for v in wanted}
    for i, j in tiles_of(matrices, progress):
        leaves = [
            tuple(
                matrix.samples[..., place, :].detach().clone().requires_grad_(need)
                for place in (i, j)
            )
            for matrix, need in zip(matrices, needed, strict=True)
        ]
        with torch.enable_grad():
            pairs = zip(matrices, leaves, strict=True)
            entries = [matrix.evaluate(*leaf) for matrix, leaf in pairs]
        # A kernel may have no gradient, as one of equal labels.
        learn = [v for v in wanted if entries[v].requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [entries[v] for v in learn],
                [leaf for v in wanted for leaf in leaves[v]],
                gradients_of_entries([entry.detach() for entry in entries], i, j, learn),
                materialize_grads=True,
            )
        )
        for v in wanted:
            for place in (i, j):
                totals[v][..., place, :] += next(gradients)
    return [totals.get(v) for v in range(len(matrices))]


def _tiled_kernel(gram: SampleGram) -> tuple[TiledKernel, Tensor]:
    x = gram.x.double()
    if gram.kernel is laplacian_kernel:
        return _laplacian(x / gram.bandwidth(order=1.0))
    if gram.kernel is rbf_kernel:
        by_product = gram.dtype != torch.float64
        scaled = scaled_samples(x, gram.bandwidth(order=2.0), by_product=by_product)
        return _rbf(scaled, by_product)
    each = x.unsqueeze(-2)
    diagonal = gram.kernel(each, each, **gram.kernel_options)[..., 0, 0]
    trace = diagonal.detach().sum(dim=-1)[..., None, None]
    # A trace of n keeps products of several matrices within the range of float64.
    scale, shift = x.shape[-2] * inverse_trace(trace), (trace == 0).double()

    def evaluate(rows: Tensor, columns: Tensor) -> Tensor:
        return gram.kernel(rows, columns, **gram.kernel_options) * scale + shift

    return TiledKernel(x, evaluate), diagonal * scale[..., 0] + shift[..., 0]


def _laplacian(x: Tensor) -> tuple[TiledKernel, Tensor]:
    """The Laplacian kernel of samples in units of the bandwidth."""

    def evaluate(rows: Tensor, columns: Tensor) -> Tensor:
        return (-distances(rows, columns, 1.0)).exp()

    return TiledKernel(x, evaluate), torch.ones_like(x[..., 0])


def _rbf(x: Tensor, by_product: bool) -> tuple[TiledKernel, Tensor]:
    """The RBF kernel of `scaled_samples`."""

    def evaluate(rows: Tensor, columns: Tensor) -> Tensor:
        kernel = rbf_by_operators if torch.is_grad_enabled() else exponentials
        return kernel(rows, columns, by_product=by_product)

    return TiledKernel(x, evaluate), torch.ones_like(x[..., 0])
