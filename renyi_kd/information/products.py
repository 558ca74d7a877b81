"""Products of matrices whose result is symmetric, and sums that make one symmetric.

No setting of PyTorch touches their digits: neither autocast, nor a reduced precision of products.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import ieee_dtype

Tile: TypeAlias = tuple[slice, slice]

# Of a symmetric product the upper triangle is enough. From this n on it is formed in this many
# strips, which is faster than the whole product at once.
_TRIANGLE = 512
_STRIPS = 8

# The width of the square tiles that are transposed at a time, so that they stay in the cache.
_WIDTH = 256


def upper_tiles(n: int, width: int) -> list[Tile]:
    """Return the tiles on and above the diagonal of an n x n matrix, as rows and columns."""
    starts = range(0, n, width)
    return [
        (slice(row, row + width), slice(column, column + width))
        for row in starts
        for column in starts
        if row <= column
    ]


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product in the dtype of its factors, to their last digits."""
    dtype = ieee_dtype(left.dtype, left.device)
    if dtype != left.dtype:
        return (left.to(dtype) @ right.to(dtype)).to(left.dtype)
    kind = left.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return left @ right
    with torch.autocast(kind, enabled=False):
        return left @ right


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of matrices `(..., n, d)` and `(..., d, n)`, if it is symmetric."""
    learns = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    plain = learns or torch.compiler.is_compiling() or needs_plain_formulas(left, right)
    if plain or (n := left.shape[-2]) < _TRIANGLE:
        return matrix_product(left, right)
    product = left.new_empty(*left.shape[:-1], n)
    height = -(-n // _STRIPS)
    for start in range(0, n, height):
        stop = start + height
        rows = matrix_product(left[..., start:stop, :], right[..., start:])
        product[..., start:stop, start:] = rows
        product[..., stop:, start:stop] = rows[..., height:].mT
    return product


def symmetric_sum(matrix: Tensor) -> Tensor:
    """Return the sum of square matrices and their transposes, shape `(..., n, n)`."""
    learns = torch.is_grad_enabled() and matrix.requires_grad
    n = matrix.shape[-1]
    if not matrix.is_cpu or learns or torch.compiler.is_compiling() or n < 2 * _WIDTH:
        return matrix + matrix.mT
    # Reading the transpose of a large matrix at once misses the cache of a CPU.
    total = torch.empty_like(matrix)
    for i, j in upper_tiles(n, _WIDTH):
        tile = matrix[..., i, j] + matrix[..., j, i].mT
        total[..., i, j] = tile
        total[..., j, i] = tile.mT
    return total
