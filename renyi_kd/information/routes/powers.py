r"""Integer orders by matrix powers, with the fewest products (InfoSAM, Eq. 1).

The gradient of :math:`\operatorname{tr} A^k` is :math:`k A^{k-1}`. So :math:`A^{k-1}` is formed
once, by a shortest chain of products. It serves the value :math:`\langle A^{k-1}, A \rangle`, and
it is kept for the gradient.
"""

import math
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd.information.kernels import inverse_trace
from renyi_kd.information.routes.tiles import upper_tiles

# The largest exponent. It takes seven products at most; eigenvalues take the time of about ten.
MAX_POWER = 32

# A product of two powers of one symmetric matrix is symmetric, so its upper triangle is enough.
# From this n on it is formed in this many strips, which is faster than the whole product at once.
_TRIANGLE = 512
_STRIPS = 8

# The width of the square tiles that are copied at a time, so that they stay in the cache.
_WIDTH = 256

# The number of rows whose products a CPU sums at a time, where they are converted to float64 first.
_ROWS = 64


def _shortest_addition_chains(limit: int) -> dict[int, tuple[int, ...]]:
    """Return for each exponent up to `limit` the exponents on a shortest way to it.

    A chain starts with 1, and each later member is the sum of its predecessor and some member. Each
    such sum is one matrix product.
    """
    shortest: dict[int, tuple[int, ...]] = {1: (1,)}
    chains: list[tuple[int, ...]] = [(1,)]
    while len(shortest) < limit:
        longer = [(*chain, chain[-1] + member) for chain in chains for member in chain]
        chains = [chain for chain in longer if chain[-1] <= limit]
        for chain in chains:
            shortest.setdefault(chain[-1], chain)
    return shortest


_ADDITION_CHAINS = _shortest_addition_chains(MAX_POWER)


def trace_of_power(matrix: Tensor, exponent: int) -> Tensor:
    r"""Return :math:`\operatorname{tr} A^k` of symmetric matrices.

    Args:
        matrix: :math:`A`, shape `(..., n, n)`.
        exponent: :math:`k` from 2 to `MAX_POWER`.

    Returns:
        The trace, shape `(...)`. It has a second derivative.
    """
    learns = torch.is_grad_enabled() and matrix.requires_grad
    if exponent > 2 and learns and not needs_plain_formulas(matrix):
        trace: Tensor = _TraceOfPower.apply(matrix, exponent)[0]
        return trace
    # The last product need not be formed: its trace is the inner product of its two factors.
    *chain, _ = _ADDITION_CHAINS[exponent]
    powers = _powers(matrix, chain)
    return _inner_product(powers[chain[-1]], powers[exponent - chain[-1]])


def entropy_by_powers(gram: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    r"""Return the Rényi entropy of integer order of a large Gram matrix, with few passes over it.

    Args:
        gram: positive semi-definite, shape `(..., n, n)`. Its symmetric part is taken.
        exponent: the order, from 2 to `MAX_POWER`.
        dtype: of the products. For float32, :math:`n^{k / 2}` has to be in its range.

    Returns:
        Entropy in bits, float64, shape `(...)`. It has a second derivative.
    """
    if torch.is_grad_enabled() and gram.requires_grad:
        bits: Tensor = _EntropyByPowers.apply(gram, exponent, dtype)[0]
        return bits
    return _entropy_and_gradient(gram, exponent, dtype)[0]


class _TraceOfPower(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
        power = _power(matrix, exponent - 1)
        return _inner_product(power, matrix), power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        matrix, ctx.exponent = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(matrix, output[1])

    @staticmethod
    def backward(ctx: Any, grad_trace: Tensor, _: Tensor) -> tuple[Tensor, None]:
        matrix, power = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative needs the graph of the power
            power = _power(matrix, ctx.exponent - 1)
        return (ctx.exponent * grad_trace)[..., None, None] * power, None


class _EntropyByPowers(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        gram: Tensor, exponent: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _entropy_and_gradient(gram, exponent, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gram, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(gram, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_bits: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        gram, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative needs their graphs
            parts = list(_entropy_and_gradient(gram, *ctx.options)[1:])
        power, power_factor, identity_factor = parts
        gradient: Tensor = power * (grad_bits * power_factor)[..., None, None].to(power.dtype)
        gradient.diagonal(dim1=-2, dim2=-1).add_((grad_bits * identity_factor)[..., None])
        return gradient.to(gram.dtype), None, None


def _entropy_and_gradient(
    gram: Tensor, exponent: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the entropy, a power of the matrix, and two factors.

    The gradient is the power times the first factor, plus the identity times the second.
    """
    root = math.sqrt(gram.shape[-1])
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
    # With the trace sqrt(n), neither the powers of a flat spectrum nor those of a single large
    # eigenvalue leave the range of float32.
    scale = root * inverse_trace(trace)
    with torch.autocast(gram.device.type, enabled=False):
        matrix = _symmetric_part(gram, scale[..., None, None], dtype)
        power = _power(matrix, exponent - 1)
    total = _inner_product(power, matrix)
    zero = (trace == 0) & (total == 0)
    total = torch.where(zero, 1.0, total)
    bits = (total.log2() - exponent * math.log2(root)) / (1 - exponent)
    slope = torch.where(zero, 0.0, scale * (exponent / ((1 - exponent) * math.log(2))))
    return torch.where(zero, 0.0, bits), power, slope / total, -slope / root


def _power(matrix: Tensor, exponent: int) -> Tensor:
    return _powers(matrix, _ADDITION_CHAINS[exponent])[exponent]


def _powers(matrix: Tensor, chain: tuple[int, ...] | list[int]) -> dict[int, Tensor]:
    powers = {1: matrix}
    for previous, current in pairwise(chain):
        powers[current] = _product(powers[previous], powers[current - previous])
    return powers


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two powers of one symmetric matrix."""
    learns = torch.is_grad_enabled() and left.requires_grad
    plain = learns or torch.compiler.is_compiling() or needs_plain_formulas(left, right)
    if plain or (n := left.shape[-1]) < _TRIANGLE:
        return left @ right
    product = torch.empty_like(left)
    height = -(-n // _STRIPS)
    for start in range(0, n, height):
        stop = start + height
        rows = left[..., start:stop, :] @ right[..., start:]
        product[..., start:stop, start:] = rows
        product[..., stop:, start:stop] = rows[..., height:].mT
    return product


def _symmetric_part(gram: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    half_scale = (scale / 2).to(dtype)
    if not gram.is_cpu or (torch.is_grad_enabled() and gram.requires_grad):
        return (gram + gram.mT).to(dtype) * half_scale
    # Tile by tile, since reading the transpose of a large matrix at once misses the cache of a CPU.
    symmetric = torch.empty_like(gram, dtype=dtype)
    for i, j in upper_tiles(gram.shape[-1], _WIDTH):
        tile = (gram[..., i, j] + gram[..., j, i].mT).to(dtype) * half_scale
        symmetric[..., i, j] = tile
        symmetric[..., j, i] = tile.mT
    return symmetric


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the products of the entries, in float64, some rows at a time."""
    blocks = [(left, right)]
    if left.is_cpu and left.dtype != torch.float64:
        parts = (torch.split(x, _ROWS, dim=-2) for x in (left, right))
        blocks = list(zip(*parts, strict=True))
    sums: list[Tensor] = [
        torch.linalg.vecdot(a.flatten(-2).double(), b.flatten(-2).double()) for a, b in blocks
    ]
    return reduce(add, sums)
