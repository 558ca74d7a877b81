r"""Traces of matrix powers, :math:`\operatorname{tr} A^k`, whose backward reuses the products.

The gradient of :math:`\operatorname{tr} A^k` is :math:`k A^{k-1}`. So :math:`A^{k-1}` is formed
once, with the fewest products, and serves the value :math:`\langle A^{k-1}, A \rangle` and the
gradient.
"""

import math
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from torch import Tensor

from renyi_kd.information.routes.frobenius import tiles_of_triangle

# Beyond it n^(1 - alpha) nears the end of float64's range, and eigenvalues cost no more.
MAX_POWER = 32

# From this n on the upper triangle of a product of powers, strip by strip, is the cheaper half.
_TRIANGLE = 512
_STRIPS = 8
_TILE, _ROWS = 256, 64


def _shortest_addition_chains(limit: int) -> dict[int, tuple[int, ...]]:
    """For each number 1..limit a shortest chain from 1 to it by steps from the chain itself."""
    found: dict[int, tuple[int, ...]] = {1: (1,)}
    chains: list[tuple[int, ...]] = [(1,)]
    while len(found) < limit:
        chains = [(*chain, chain[-1] + step) for chain in chains for step in chain]
        chains = [chain for chain in chains if chain[-1] <= limit]
        for chain in chains:
            found.setdefault(chain[-1], chain)
    return found


_ADDITION_CHAINS = _shortest_addition_chains(MAX_POWER)


def trace_of_power(matrix: Tensor, exponent: int) -> Tensor:
    r"""The trace :math:`\operatorname{tr} A^k` of symmetric matrices.

    Args:
        matrix: shape `(..., n, n)`.
        exponent: :math:`k` from 2 to `MAX_POWER`.

    Returns:
        The trace, shape `(...)`. It has a second derivative.
    """
    if exponent > 2 and torch.is_grad_enabled() and matrix.requires_grad:
        trace: Tensor = _TraceOfPower.apply(matrix, exponent)[0]
        return trace
    *chain, _ = _ADDITION_CHAINS[exponent]
    powers = _powers(matrix, chain)
    return inner_product(powers[chain[-1]], powers[exponent - chain[-1]])


class _TraceOfPower(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
        power = _power(matrix, exponent - 1)
        return inner_product(power, matrix), power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        matrix, ctx.exponent = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(matrix, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        matrix, power = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            power = _power(matrix, ctx.exponent - 1)
        return (ctx.exponent * grad)[..., None, None] * power, None


def _power(matrix: Tensor, exponent: int) -> Tensor:
    return _powers(matrix, _ADDITION_CHAINS[exponent])[exponent]


def _powers(matrix: Tensor, chain: tuple[int, ...] | list[int]) -> dict[int, Tensor]:
    powers = {1: matrix}
    for previous, current in pairwise(chain):
        powers[current] = _product(powers[previous], powers[current - previous])
    return powers


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Product of two powers of one symmetric matrix, which is symmetric too."""
    n = left.shape[-1]
    if n < _TRIANGLE or (torch.is_grad_enabled() and left.requires_grad):
        return left @ right
    product = torch.empty_like(left)
    height = -(-n // _STRIPS)
    for start in range(0, n, height):
        stop = start + height
        rows = left[..., start:stop, :] @ right[..., start:]
        product[..., start:stop, start:] = rows
        product[..., stop:, start:stop] = rows[..., height:].mT
    return product


def _symmetric(gram: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Its sum with its transpose, scaled: by tiles, of which both stay in the cache."""
    if torch.is_grad_enabled() and gram.requires_grad:
        return (gram + gram.mT).to(dtype) * scale.to(dtype)
    symmetric = torch.empty_like(gram, dtype=dtype)
    for i, j in tiles_of_triangle(gram.shape[-1], _TILE):
        tile = (gram[..., i, j] + gram[..., j, i].mT).to(dtype) * scale.to(dtype)
        symmetric[..., i, j] = tile
        symmetric[..., j, i] = tile.mT
    return symmetric


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Sum of the products of the entries, float64, in blocks that stay in the cache."""
    height = left.shape[-2] if left.dtype == torch.float64 else _ROWS
    blocks = zip(*(torch.split(x, height, dim=-2) for x in (left, right)), strict=True)
    parts: list[Tensor] = [
        torch.linalg.vecdot(a.flatten(-2).double(), b.flatten(-2).double()) for a, b in blocks
    ]
    return reduce(add, parts)


def entropy_by_powers(gram: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    r"""Rényi entropy of integer order of a large Gram matrix, with few passes over it.

    Args:
        gram: positive semi-definite, shape `(..., n, n)`. Its symmetric part is taken.
        exponent: order from 2 to `MAX_POWER`.
        dtype: of the products; float32 as long as :math:`n^{k / 2}` is in its range.

    Returns:
        Entropy in bits, float64, shape `(...)`. It has a second derivative.
    """
    if torch.is_grad_enabled() and gram.requires_grad:
        bits: Tensor = _EntropyByPowers.apply(gram, exponent, dtype)[0]
        return bits
    return _entropy_and_slopes(gram, exponent, dtype)[0]


def _entropy_and_slopes(
    gram: Tensor, exponent: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, a power, and what times the power and what times the identity is the gradient."""
    root = math.sqrt(gram.shape[-1])
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
    # Of trace sqrt(n) neither the powers of a flat spectrum nor those of a spike leave float32.
    scale = root / torch.where(trace == 0, 1.0, trace)
    with torch.autocast(gram.device.type, enabled=False):
        matrix = _symmetric(gram, (scale / 2)[..., None, None], dtype)
        power = _power(matrix, exponent - 1)
    total = inner_product(power, matrix)
    zero = (trace == 0) & (total == 0)
    total = torch.where(zero, 1.0, total)
    bits = (total.log2() - exponent * math.log2(root)) / (1 - exponent)
    slope = torch.where(zero, 0.0, scale * (exponent / ((1 - exponent) * math.log(2))))
    return torch.where(zero, 0.0, bits), power, slope / total, -slope / root


class _EntropyByPowers(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        gram: Tensor, exponent: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _entropy_and_slopes(gram, exponent, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gram, *ctx.how = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(gram, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        gram, power, of_power, of_identity = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            power, of_power, of_identity = _entropy_and_slopes(gram, *ctx.how)[1:]
        gradient = power * (grad * of_power)[..., None, None].to(power.dtype)
        gradient.diagonal(dim1=-2, dim2=-1).add_((grad * of_identity)[..., None])
        return gradient.to(gram.dtype), None, None
