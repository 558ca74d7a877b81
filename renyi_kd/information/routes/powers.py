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
from renyi_kd.information.products import symmetric_product

# The largest exponent. It takes seven products at most; eigenvalues take the time of about ten.
MAX_POWER = 32

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


def entropy_by_powers(matrix: Tensor, exponent: int) -> Tensor:
    """Return the Rényi entropy of integer order of matrices of trace one, in bits, float64."""
    trace = trace_of_power(matrix, exponent)
    return _entropy_of_trace(trace, matrix, exponent)


def entropy_and_gradient_by_powers(matrix: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Return also the gradient of the entropy of the matrix divided by its trace, in its dtype."""
    power = _power(matrix, exponent - 1)
    trace = _inner_product(power, matrix)
    slope = exponent / ((1 - exponent) * math.log(2))
    gradient = power * (slope / trace)[..., None, None].to(power.dtype)
    gradient.diagonal(dim1=-2, dim2=-1).sub_(slope)
    return _entropy_of_trace(trace, matrix, exponent), gradient


def _entropy_of_trace(trace: Tensor, matrix: Tensor, exponent: int) -> Tensor:
    logarithm = trace.log2()
    if matrix.dtype != torch.float64:
        # Rounding to float32 leaves a trace of nearly one.
        diagonal = matrix.detach().diagonal(dim1=-2, dim2=-1)
        logarithm = logarithm - exponent * diagonal.sum(dim=-1, dtype=torch.float64).log2()
    return logarithm / (1 - exponent)


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
        slope = (ctx.exponent * grad_trace)[..., None, None].to(power.dtype)
        return slope * power, None


def _power(matrix: Tensor, exponent: int) -> Tensor:
    return _powers(matrix, _ADDITION_CHAINS[exponent])[exponent]


def _powers(matrix: Tensor, chain: tuple[int, ...] | list[int]) -> dict[int, Tensor]:
    powers = {1: matrix}
    for previous, current in pairwise(chain):
        powers[current] = symmetric_product(powers[previous], powers[current - previous])
    return powers


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
