r"""Both projections and the image's layer norm, folded into one query a token (Eq. 8 and 9).

.. math:: \frac{W_Q \operatorname{LN}(m) \cdot W_K \operatorname{LN}(f)}{\sqrt{D}}
    = \frac{w \cdot (f - \mu)}{\sigma} + c

for a token :math:`m` and every pixel :math:`f` of mean :math:`\mu` and standard deviation
:math:`\sigma`. So the key projection is applied to the few queries, and not to all pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from renyi_kd._precision import ieee_dtype


def fold_query(
    tokens: Tensor,
    token_norm: tuple[Tensor, Tensor],
    query_proj: tuple[Tensor, Tensor],
    key_proj: tuple[Tensor, Tensor],
    pixel_norm: tuple[Tensor, Tensor],
    *,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    r"""Return the query :math:`w` and the offset :math:`c` of each token.

    Args:
        tokens: :math:`m`, shape `(B, N, D)`.
        token_norm: weight and bias of the tokens' layer norm.
        query_proj: weight and bias of :math:`W_Q`.
        key_proj: weight and bias of :math:`W_K`.
        pixel_norm: weight and bias of the image embedding's layer norm.
        residual: whether :math:`\operatorname{LN}(m) \cdot \operatorname{LN}(f)` is added to the
            left side.
        eps: what the tokens' layer norm adds to the variance.

    Returns:
        Query, shape `(B, N, D)`, and offset, shape `(B, N)`. They have no second derivative.
    """
    query, offset, *_ = fold_operator(
        tokens, *token_norm, *query_proj, *key_proj, *pixel_norm, residual, eps
    )
    return query, offset


def fold_by_operators(
    tokens: Tensor,
    token_scale: Tensor,
    token_shift: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    pixel_scale: Tensor,
    pixel_shift: Tensor,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return query and offset, and what backward needs besides its inputs."""
    dim, dtype = tokens.shape[2], ieee_dtype(tokens.dtype, tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        normalized, mean, rstd = torch.native_layer_norm(
            tokens, (dim,), token_scale, token_shift, eps
        )
        projected = F.linear(normalized.to(dtype), query_weight.to(dtype), query_bias.to(dtype)).to(
            tokens.dtype
        )
        projected /= dim**0.5
        folded = (projected.to(dtype) @ key_weight.to(dtype)).to(tokens.dtype)
        if residual:
            folded += normalized
        offset = torch.addcmul(projected * key_bias, folded, pixel_shift).sum(dim=2)
    return folded * pixel_scale, offset, normalized, mean, rstd, projected, folded


fold_operator = torch.library.custom_op("renyi_kd::fold", fold_by_operators, mutates_args=())


@fold_operator.register_fake
def _fold_shapes(
    tokens: Tensor,
    token_scale: Tensor,
    token_shift: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    pixel_scale: Tensor,
    pixel_shift: Tensor,
    residual: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like_tokens() -> Tensor:
        return tokens.new_empty(tokens.shape)

    def moment() -> Tensor:
        return tokens.new_empty(*tokens.shape[:2], 1)

    return (
        like_tokens(),
        tokens.new_empty(tokens.shape[:2]),
        like_tokens(),
        moment(),
        moment(),
        like_tokens(),
        like_tokens(),
    )


def fold_backward_by_operators(
    grad_query: Tensor,
    grad_offset: Tensor,
    tokens: Tensor,
    token_scale: Tensor,
    token_shift: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    pixel_scale: Tensor,
    pixel_shift: Tensor,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    projected: Tensor,
    folded: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tokens and of all parameters, in the order of the arguments."""
    dim, dtype = tokens.shape[2], ieee_dtype(tokens.dtype, tokens.device)
    grad_offset = grad_offset.unsqueeze(2)
    with torch.autocast(tokens.device.type, enabled=False):
        grad_folded = torch.addcmul(grad_query * pixel_scale, grad_offset, pixel_shift)
        grad_projected = F.linear(grad_folded.to(dtype), key_weight.to(dtype)).to(tokens.dtype)
        grad_projected = torch.addcmul(grad_projected, grad_offset, key_bias).div_(dim**0.5)
        grad_normalized = (grad_projected.to(dtype) @ query_weight.to(dtype)).to(tokens.dtype)
        if residual:
            grad_normalized += grad_folded
        grad_query_weight = _sum_of_outer_products(grad_projected, normalized, dtype)
        grad_key_weight = _sum_of_outer_products(projected, grad_folded, dtype)
        grad_tokens, grad_token_scale, grad_token_shift = torch.ops.aten.native_layer_norm_backward(
            grad_normalized, tokens, (dim,), mean, rstd, token_scale, token_shift, [True] * 3
        )
    return (
        grad_tokens,
        grad_token_scale,
        grad_token_shift,
        grad_query_weight,
        grad_projected.sum(dim=(0, 1)),
        grad_key_weight,
        (grad_offset * projected).sum(dim=(0, 1)),
        (grad_query * folded).sum(dim=(0, 1)),
        (grad_offset * folded).sum(dim=(0, 1)),
    )


fold_backward_operator = torch.library.custom_op(
    "renyi_kd::fold_backward", fold_backward_by_operators, mutates_args=()
)


@fold_backward_operator.register_fake
def _fold_backward_shapes(
    grad_query: Tensor,
    grad_offset: Tensor,
    tokens: Tensor,
    token_scale: Tensor,
    token_shift: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    pixel_scale: Tensor,
    pixel_shift: Tensor,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    projected: Tensor,
    folded: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def vector() -> Tensor:
        return tokens.new_empty(tokens.shape[2])

    return (
        tokens.new_empty(tokens.shape),
        vector(),
        vector(),
        query_weight.new_empty(query_weight.shape),
        vector(),
        key_weight.new_empty(key_weight.shape),
        vector(),
        vector(),
        vector(),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, token_scale, token_shift, query_weight, _, key_weight, key_bias, *rest = inputs
    pixel_scale, pixel_shift, ctx.residual, _ = rest
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        tokens,
        token_scale,
        token_shift,
        query_weight,
        key_weight,
        key_bias,
        pixel_scale,
        pixel_shift,
        *output[2:],
    )


def _gradients(
    ctx: Any, grad_query: Tensor | None, grad_offset: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tokens, *rest = ctx.saved_tensors
    if grad_query is None:
        grad_query = torch.zeros_like(tokens)
    if grad_offset is None:
        grad_offset = tokens.new_zeros(tokens.shape[:2])
    gradients = fold_backward_operator(grad_query, grad_offset, tokens, *rest, ctx.residual)
    return (*gradients, None, None)


fold_operator.register_autograd(_gradients, setup_context=_save_for_backward)


def _sum_of_outer_products(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.flatten(0, 1).mT.to(dtype) @ y.flatten(0, 1).to(dtype)).to(x.dtype)
