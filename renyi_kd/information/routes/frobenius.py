r"""Order 2 by the Frobenius norms of large Hadamard products, one tile after the other.

.. math:: S_2(K_1, \dots, K_k) = -\log_2 \frac{\lVert K_1 \circ \dots \circ K_k \rVert_F^2}
    {(\operatorname{tr} K_1 \circ \dots \circ K_k)^2}

Tiles above the diagonal stand for those below it too, and each is read once for all the entropies
that are asked for. Nothing of the size of a matrix is written but the gradients.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add, mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

Subset: TypeAlias = tuple[int, ...]

# Small enough for a core's cache in float64, with a few products.
_TILE = 256


def entropies_by_tiles(grams: Sequence[Tensor], subsets: Sequence[Subset]) -> Tensor:
    """Entropies of order 2 of large Gram matrices and of their joints.

    Args:
        grams: positive semi-definite, all of one shape `(..., n, n)`. Symmetric parts are taken.
        subsets: for each entropy the indices of the matrices whose joint it is of.

    Returns:
        Entropies in bits, float64, shape `(len(subsets), ...)`. They have second derivatives.
    """
    norms, traces = _HadamardNorms.apply(subsets, *grams)
    return entropies_from_norms(norms, traces)


def entropies_from_norms(squared_norms: Tensor, traces: Tensor) -> Tensor:
    r""":math:`-\log_2 (\lVert K \rVert_F^2 / (\operatorname{tr} K)^2)`, 0 for a zero matrix."""
    zero = (squared_norms == 0) & (traces == 0)
    ratio = torch.where(zero, 1.0, squared_norms) / torch.where(zero, 1.0, traces).square()
    return -ratio.log2()


def joint(values: Sequence[Tensor], subset: Iterable[int]) -> Tensor:
    """Hadamard product of the named ones."""
    return reduce(mul, (values[v] for v in subset))


def squared_norms(tiles: Sequence[Tensor], subsets: Sequence[Subset]) -> Tensor:
    """Squared Frobenius norm of each joint of `tiles`, shape `(len(subsets), ...)`."""
    products = [joint(tiles, subset).flatten(-2) for subset in subsets]
    return torch.stack([torch.linalg.vecdot(product, product) for product in products])


def norm_gradients(
    tiles: Sequence[Tensor], subsets: Sequence[Subset], of_norms: Tensor, wanted: Iterable[int]
) -> dict[int, Tensor]:
    """Gradients of the tiles that are `wanted`, from those of their `squared_norms`."""
    squares = [tile.square() for tile in tiles] if len(tiles) > 1 else tiles
    of_squares = of_norms[..., None, None]
    return {v: _derivative(v, squares, subsets, 2 * of_squares) * tiles[v] for v in wanted}


def tiles_of_triangle(n: int, tile: int) -> list[tuple[slice, slice]]:
    """The tiles on and above the diagonal, as slices of rows and columns."""
    starts = range(0, n, tile)
    return [(slice(i, i + tile), slice(j, j + tile)) for i in starts for j in starts if i <= j]


class _HadamardNorms(torch.autograd.Function):
    """Squared Frobenius norms and traces of the joints of scaled matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(subsets: Sequence[Subset], *grams: Tensor) -> tuple[Tensor, Tensor]:
        return _norms_and_traces(grams, subsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.subsets, *grams = inputs
        ctx.save_for_backward(*grams)

    @staticmethod
    def backward(ctx: Any, *of_results: Tensor) -> tuple[Tensor | None, ...]:
        grams = ctx.saved_tensors
        wanted = [v for v, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        if torch.is_grad_enabled():  # for a second derivative
            gradients = _gradients_at_once(grams, ctx.subsets, wanted, *of_results)
        else:
            gradients = _gradients(grams, ctx.subsets, wanted, *of_results)
        return None, *(gradients.get(v) for v in range(len(grams)))


def _norms_and_traces(grams: Sequence[Tensor], subsets: Sequence[Subset]) -> tuple[Tensor, Tensor]:
    scaling = _scaling(grams)
    diagonals = _diagonals(grams, scaling)
    traces = torch.stack([joint(diagonals, subset).sum(dim=-1) for subset in subsets])
    norms = [
        (1 if i == j else 2) * squared_norms(_tiles(grams, scaling, i, j), subsets)
        for i, j in tiles_of_triangle(grams[0].shape[-1], _TILE)
    ]
    return reduce(add, norms), traces


def _gradients(
    grams: Sequence[Tensor],
    subsets: Sequence[Subset],
    wanted: Sequence[int],
    of_norms: Tensor,
    of_traces: Tensor,
) -> dict[int, Tensor]:
    scaling = _scaling(grams)
    gradients = {v: torch.empty_like(grams[v]) for v in wanted}
    for i, j in tiles_of_triangle(grams[0].shape[-1], _TILE):
        tiles = _tiles(grams, scaling, i, j)
        of_tiles = norm_gradients(tiles, subsets, of_norms, wanted)
        for v, gradient in gradients.items():
            of_tile = of_tiles[v] * scaling[v][0]
            gradient[..., i, j] = of_tile
            gradient[..., j, i] = of_tile.mT
    diagonals = _diagonals(grams, scaling)
    for v, gradient in gradients.items():
        of_diagonal = _derivative(v, diagonals, subsets, of_traces[..., None])
        gradient.diagonal(dim1=-2, dim2=-1).add_(scaling[v][0].squeeze(-1) * of_diagonal)
    return gradients


def _gradients_at_once(
    grams: Sequence[Tensor],
    subsets: Sequence[Subset],
    wanted: Sequence[int],
    of_norms: Tensor,
    of_traces: Tensor,
) -> dict[int, Tensor]:
    """As `_gradients`, by operators that can be differentiated and mapped over."""
    scaling = _scaling(grams)
    matrices = _tiles(grams, scaling, slice(None), slice(None))
    of_matrices = norm_gradients(matrices, subsets, of_norms, wanted)
    diagonals = _diagonals(grams, scaling)
    gradients = {}
    for v in wanted:
        of_diagonal = _derivative(v, diagonals, subsets, of_traces[..., None])
        of_diagonal = torch.diag_embed(of_diagonal.expand_as(diagonals[v]))
        gradient = (of_matrices[v] + of_diagonal) * scaling[v][0]
        gradients[v] = gradient.to(grams[v].dtype)
    return gradients


def _derivative(
    v: int, factors: Sequence[Tensor], subsets: Sequence[Subset], of_products: Tensor
) -> Tensor:
    """Gradient of factor `v` of the products over `subsets`, from the gradients of the products."""
    total = torch.zeros_like(of_products[0])
    for of_product, subset in zip(of_products, subsets, strict=True):
        others = [u for u in subset if u != v]
        if others and v in subset:
            total = total.addcmul(joint(factors, others), of_product)
        elif v in subset:
            total = total + of_product
    return total


def _scaling(grams: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each matrix a factor and a shift, constants whose choice no entropy depends on.

    The factor makes the trace n, so that no product leaves the range of float64. The shift makes a
    zero matrix all ones, the limit of adding a constant.
    """
    scaling = []
    for gram in grams:
        trace = gram.detach().diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
        zero = trace[..., None, None] == 0
        scaling.append(
            (gram.shape[-1] / torch.where(zero, 1.0, trace[..., None, None]), zero.double())
        )
    return scaling


def _diagonals(grams: Sequence[Tensor], scaling: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [
        _scaled(gram.diagonal(dim1=-2, dim2=-1).double(), scale[..., 0], shift[..., 0], len(grams))
        for gram, (scale, shift) in zip(grams, scaling, strict=True)
    ]


def _tiles(
    grams: Sequence[Tensor], scaling: Sequence[tuple[Tensor, Tensor]], i: slice, j: slice
) -> list[Tensor]:
    """Tiles of the symmetric parts, scaled and shifted, float64."""
    return [
        _scaled((gram[..., i, j] + gram[..., j, i].mT).double(), scale / 2, shift, len(grams))
        for gram, (scale, shift) in zip(grams, scaling, strict=True)
    ]


def _scaled(entries: Tensor, scale: Tensor, shift: Tensor, count: int) -> Tensor:
    # By itself a zero matrix needs no shift, and no pass over the entries for it.
    return entries * scale + shift if count > 1 else entries * scale
