r"""Order 2 by the Frobenius norms of large Hadamard products, tile by tile (InfoSAM, Eq. 22).

.. math:: S_2(K_1, \dots, K_k) = -\log_2 \frac{\lVert K_1 \circ \dots \circ K_k \rVert_F^2}
    {(\operatorname{tr} K_1 \circ \dots \circ K_k)^2}

A joint entropy is named by the numbers of its matrices, its subset. One pass over the tiles, which
reads or evaluates each matrix once, collects the norms of all joints that are asked for. Nothing as
large as a matrix is written but the gradient of one that is given as a matrix.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import first_derivative_only
from renyi_kd.information.kernels import Subset, hadamard_product, inverse_trace
from renyi_kd.information.routes.tiles import (
    Evaluate,
    Progress,
    Tile,
    each_tile,
    from_rows_and_columns,
    gradients_of_samples,
    rows_and_columns,
    tiled_kernels,
    upper_tiles,
)
from renyi_kd.information.samples import SampleGram

# The width of a tile of given matrices. On a CPU some and their products, in float64, should
# fit into a core's cache; on a GPU each tile costs launches.
_WIDTH, _WIDTH_ON_GPU = 256, 4096


def entropies_of_matrices(grams: Sequence[Tensor], subsets: Sequence[Subset]) -> Tensor:
    """Return joint entropies of order 2 of large Gram matrices.

    Args:
        grams: positive semi-definite, all of one shape `(..., n, n)`. The symmetric part of each is
            taken.
        subsets: for each entropy the numbers of the matrices it is of.

    Returns:
        Entropies in bits, float64, shape `(len(subsets), ...)`. They have second derivatives.
    """
    norms, traces = _NormsAndTraces.apply(subsets, *grams)
    return _entropies_from_norms(norms, traces)


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
    norms = _NormsOfSamples.apply(subsets, evaluate, progress, *rows_and_columns(matrices))
    traces = [hadamard_product(diagonals, subset).sum(dim=-1) for subset in subsets]
    return _entropies_from_norms(norms, torch.stack(traces))


def _entropies_from_norms(squared_norms: Tensor, traces: Tensor) -> Tensor:
    zero = (squared_norms == 0) & (traces == 0)
    ratio = torch.where(zero, 1.0, squared_norms) / torch.where(zero, 1.0, traces).square()
    return -ratio.log2()


def _squared_norms(tiles: Sequence[Tensor], subsets: Sequence[Subset]) -> Tensor:
    """Return the squared norm of each Hadamard product of `tiles`, shape `(len(subsets), ...)`."""
    products = [hadamard_product(tiles, subset).flatten(-2) for subset in subsets]
    return torch.stack([torch.linalg.vecdot(product, product) for product in products])


def _gradients_of_tiles(
    tiles: Sequence[Tensor],
    subsets: Sequence[Subset],
    grad_norms: Tensor,
    wanted: Iterable[int],
) -> dict[int, Tensor]:
    """Return the gradients of the `wanted` tiles, from those of their `_squared_norms`."""
    # The square of a product is the product of squares, and the derivative of a square is twice the
    # tile.
    squares = [tile.square() for tile in tiles] if len(tiles) > 1 else tiles
    grad_products = 2 * grad_norms[..., None, None]
    return {v: _derivative(v, squares, subsets, grad_products) * tiles[v] for v in wanted}


def _derivative(
    v: int, factors: Sequence[Tensor], subsets: Sequence[Subset], grad_products: Tensor
) -> Tensor:
    """Return the gradient of factor `v`, from those of the products over `subsets`."""
    total = torch.zeros_like(grad_products[0])
    for grad_product, subset in zip(grad_products, subsets, strict=True):
        others = [u for u in subset if u != v]
        if others and v in subset:
            total = total.addcmul(hadamard_product(factors, others), grad_product)
        elif v in subset:
            total = total + grad_product
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
        for i, j, tiles in each_tile(from_rows_and_columns(samples, evaluate), progress):
            norms += (1 if i == j else 2) * _squared_norms(tiles, subsets)
        return norms

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_norms: Tensor) -> tuple[Tensor | None, ...]:
        def gradients_of_entries(
            tiles: list[Tensor], i: slice, j: slice, wanted: list[int]
        ) -> list[Tensor]:
            counted = grad_norms if i == j else 2 * grad_norms
            return list(_gradients_of_tiles(tiles, ctx.subsets, counted, wanted).values())

        matrices = from_rows_and_columns(ctx.saved_tensors, ctx.evaluate)
        needed = ctx.needs_input_grad[3:]
        gradients = gradients_of_samples(matrices, gradients_of_entries, needed, ctx.progress)
        return None, None, None, *gradients


class _NormsAndTraces(torch.autograd.Function):
    """The squared norms and the traces of Hadamard products of given matrices, scaled."""

    generate_vmap_rule = True

    @staticmethod
    def forward(subsets: Sequence[Subset], *grams: Tensor) -> tuple[Tensor, Tensor]:
        scaled = _Scaled(grams)
        traces = [hadamard_product(scaled.diagonals(), subset).sum(dim=-1) for subset in subsets]
        norms = [
            (1 if i == j else 2) * _squared_norms(scaled.tiles(i, j), subsets)
            for i, j in _tiles(grams[0])
        ]
        return reduce(add, norms), torch.stack(traces)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.subsets, *grams = inputs
        ctx.save_for_backward(*grams)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grams = ctx.saved_tensors
        wanted = [v for v, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        # With a graph, that is for a second derivative, whole matrices are needed.
        gradients_of = _gradients_at_once if torch.is_grad_enabled() else _gradients_by_tiles
        gradients = gradients_of(grams, ctx.subsets, wanted, *grad_outputs)
        return None, *(gradients.get(v) for v in range(len(grams)))


def _tiles(gram: Tensor) -> list[Tile]:
    return upper_tiles(gram.shape[-1], _WIDTH if gram.is_cpu else _WIDTH_ON_GPU)


def _gradients_by_tiles(
    grams: Sequence[Tensor],
    subsets: Sequence[Subset],
    wanted: Sequence[int],
    grad_norms: Tensor,
    grad_traces: Tensor,
) -> dict[int, Tensor]:
    scaled = _Scaled(grams)
    gradients = {v: torch.empty_like(grams[v]) for v in wanted}
    for i, j in _tiles(grams[0]):
        grad_tiles = _gradients_of_tiles(scaled.tiles(i, j), subsets, grad_norms, wanted)
        for v, gradient in gradients.items():
            grad_tile = grad_tiles[v] * scaled.scales[v]
            gradient[..., i, j] = grad_tile
            gradient[..., j, i] = grad_tile.mT
    diagonals = scaled.diagonals()
    for v, gradient in gradients.items():
        grad_diagonal = _derivative(v, diagonals, subsets, grad_traces[..., None])
        gradient.diagonal(dim1=-2, dim2=-1).add_(scaled.scales[v].squeeze(-1) * grad_diagonal)
    return gradients


def _gradients_at_once(
    grams: Sequence[Tensor],
    subsets: Sequence[Subset],
    wanted: Sequence[int],
    grad_norms: Tensor,
    grad_traces: Tensor,
) -> dict[int, Tensor]:
    """Do what `_gradients_by_tiles` does, by operators that can be differentiated again."""
    scaled = _Scaled(grams)
    matrices = scaled.tiles(slice(None), slice(None))
    grad_matrices = _gradients_of_tiles(matrices, subsets, grad_norms, wanted)
    diagonals = scaled.diagonals()
    gradients = {}
    for v in wanted:
        grad_diagonal = _derivative(v, diagonals, subsets, grad_traces[..., None])
        grad_diagonal = torch.diag_embed(grad_diagonal.expand_as(diagonals[v]))
        gradient = (grad_matrices[v] + grad_diagonal) * scaled.scales[v]
        gradients[v] = gradient.to(grams[v].dtype)
    return gradients


class _Scaled:
    """The symmetric parts of Gram matrices, in float64, each scaled and shifted.

    Scale and shift are constants, on whose choice no entropy depends. The scale makes each trace n,
    so that no product leaves the range of float64. The shift makes a zero matrix one of equal
    entries, which is the limit of adding a constant.
    """

    def __init__(self, grams: Sequence[Tensor]) -> None:
        self.grams = grams
        self.scales: list[Tensor] = []
        self.shifts: list[Tensor] = []
        for gram in grams:
            diagonal = gram.detach().diagonal(dim1=-2, dim2=-1)
            trace = diagonal.sum(dim=-1, dtype=torch.float64)[..., None, None]
            self.scales.append(gram.shape[-1] * inverse_trace(trace))
            self.shifts.append((trace == 0).double())

    def diagonals(self) -> list[Tensor]:
        """Return the diagonals, shape `(..., n)` each."""
        return [
            self._shifted(gram.diagonal(dim1=-2, dim2=-1).double() * scale[..., 0], shift[..., 0])
            for gram, scale, shift in zip(self.grams, self.scales, self.shifts, strict=True)
        ]

    def tiles(self, i: slice, j: slice) -> list[Tensor]:
        """Return the entries in rows `i` and columns `j` of each matrix."""
        return [
            self._shifted((gram[..., i, j] + gram[..., j, i].mT).double() * (scale / 2), shift)
            for gram, scale, shift in zip(self.grams, self.scales, self.shifts, strict=True)
        ]

    def _shifted(self, entries: Tensor, shift: Tensor) -> Tensor:
        # A zero matrix by itself needs no shift, and a pass over the entries is saved.
        return entries + shift if len(self.grams) > 1 else entries
