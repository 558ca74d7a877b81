"""Joint Gram matrices, and the gradient of what is computed from them (Eq. 2 and 16)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renyi_kd._autograd import gradients_by_operators, needs_plain_formulas
from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import (
    Subset,
    gradient_of_factor,
    hadamard_product,
    signed_sum,
    sum_over_joints_by_operators,
)
from renyi_kd.information.products import symmetric_sum


class Entropy(NamedTuple):
    """Two ways to the entropy of symmetric matrices of trace one, in bits."""

    value: Callable[[Tensor], Tensor]
    """Takes matrices `(..., n, n)`, and returns `(...)` by operators that have derivatives."""
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Returns also the gradient of the entropy of a matrix divided by its trace, `(..., n, n)`."""


def sum_over_joints(
    grams: Sequence[Tensor],
    signs: Sequence[int],
    subsets: Sequence[Subset],
    entropy: Entropy,
    dtype: torch.dtype,
) -> Tensor:
    """Return a sum of entropies of joint Gram matrices, each times its sign.

    Args:
        grams: all of one shape `(..., n, n)`. The symmetric part of each is taken.
        signs: of the entropies.
        subsets: for each entropy the numbers of the matrices it is of.
        entropy: of a joint matrix.
        dtype: of the joint matrices.

    Returns:
        The sum in bits, float64, shape `(...)`, with the derivatives that `entropy.value` has.
    """
    learns = torch.is_grad_enabled() and any(gram.requires_grad for gram in grams)
    total: Tensor = _SumOverJoints.apply(signs, subsets, entropy, dtype, learns, *grams)
    return total


class _SumOverJoints(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        signs: Sequence[int],
        subsets: Sequence[Subset],
        entropy: Entropy,
        dtype: torch.dtype,
        learns: bool,
        *grams: Tensor,
    ) -> Tensor:
        twice = symmetric_sum(_stack(grams)).to(dtype)
        # In float64, as the trace of float32 matrices may leave their range.
        traces = _trace(twice, torch.float64)
        # Neither scale nor shift changes an entropy. A zero matrix becomes one of equal entries,
        # which is the limit of adding a constant.
        zero = traces == 0
        scales = traces.masked_fill(zero, math.inf).reciprocal().to(dtype)[..., None, None]
        matrices = torch.addcmul(zero[..., None, None].to(dtype), twice, scales).unbind()
        joints = _stack([hadamard_product(matrices, subset) for subset in subsets])
        of_joints = _trace(joints)[..., None, None]
        joints = joints / of_joints
        if not learns:
            return signed_sum(signs, entropy.value(joints).unbind())
        bits, slopes = entropy.value_and_gradient(joints)
        of_products = [
            slope if sign == 1 else sign * slope
            for sign, slope in zip(signs, (slopes / of_joints).unbind(), strict=True)
        ]
        numbers = range(len(grams))
        gradients = [gradient_of_factor(v, matrices, subsets, of_products) for v in numbers]
        slopes = (_stack(gradients) * (2 * scales)).to(compute_dtype(*grams))
        ctx.plain = partial(sum_over_joints_by_operators, signs, subsets, entropy.value)
        ctx.save_for_backward(*grams, slopes)
        return signed_sum(signs, bits.unbind())

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None]
        *grams, slopes = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_formulas(grad_total):
            gradients = gradients_by_operators(ctx.plain, grams, grad_total)
        else:
            gradients = list((slopes * grad_total[..., None, None].to(slopes.dtype)).unbind())
        return None, None, None, None, None, *gradients


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(list(matrices))


def _trace(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=dtype)
