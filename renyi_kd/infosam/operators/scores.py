r"""Relation scores from the image embedding as it is (InfoSAM, Eq. 8 and 9, folded).

The textbook form normalises and projects every pixel. With the key projection and the layer norm's
scale folded into the query of a token, neither is needed:

.. math:: W_Q \operatorname{LN}(m) \cdot W_K \operatorname{LN}(f_p)
    = \frac{w \cdot (f_p - \mu_p)}{\sigma_p} + c

A pixel :math:`f_p` takes part by its mean, its deviation and its inner product with :math:`w`.
Nothing of the size of the map is written or kept but its gradient. The kernel reads the map once
each way; here moments and products are passes of their own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from renyi_kd._precision import ieee_dtype

# Elements of a map that a loop takes at a time on a CPU: a megabyte of float32, which stays in the
# cache for the passes after the first and is long against the overhead of a call.
BLOCK = 2**18


def relation_scores(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> Tensor:
    r"""Scores :math:`w_n \cdot (f_p - \mu_p) / \sigma_p + v_n \cdot f_p + c_n`.

    Args:
        pixels: :math:`f`, shape `(B, P, D)`, of any strides and floating-point dtype.
        query: :math:`w`, shape `(B, N, D)`, float32 or float64.
        residual: :math:`v`, shape `(B, N, D)`, in the dtype of `query`, or None.
        offset: :math:`c`, shape `(B, N)`, in the dtype of `query`.
        eps: what is added to a pixel's variance.

    Returns:
        Scores, shape `(B, N, P)`, in the dtype of `query`. They have no second derivative.
    """
    scores: Tensor = op(pixels, query, residual, offset, eps)[0]
    return scores


def scores_by_blocks(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores; their normalised part without `offset`; mean and 1 / deviation of each pixel."""
    dtype = ieee_dtype(query.dtype, query.device)
    rows = _rows(query, residual).to(dtype)
    products = rows.new_empty(*rows.shape[:2], pixels.shape[1])
    mean, variance = rows.new_empty(pixels.shape[:2]), rows.new_empty(pixels.shape[:2])
    with torch.autocast(pixels.device.type, enabled=False):
        for b, p in _blocks(pixels, whole=pixels.dtype == dtype):
            block = pixels[b, p].to(dtype)
            _moments(block, mean[b, p], variance[b, p])
            if block.stride(2) == 1:
                products[b, :, p] = (block @ rows[b].mT).mT
            else:
                products[b, :, p] = rows[b] @ block.mT
    # Where the squares overflow, a reciprocal of zero would pass for a constant pixel.
    rstd = torch.where(variance == torch.inf, torch.nan, (variance + eps).rsqrt())
    normalized = products[:, : query.shape[1]] * rstd.unsqueeze(1)
    scores = normalized + offset.unsqueeze(2)
    if residual is not None:
        scores += products[:, query.shape[1] :]
    return (
        scores.to(query.dtype),
        normalized.to(query.dtype),
        mean.to(query.dtype),
        rstd.to(query.dtype),
    )


op = torch.library.custom_op("renyi_kd::scores", scores_by_blocks, mutates_args=())


@op.register_fake
def _(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = query.new_empty(*query.shape[:2], pixels.shape[1])
    mean = query.new_empty(pixels.shape[:2])
    return scores, torch.empty_like(scores), mean, torch.empty_like(mean)


def gradients_by_blocks(
    grad: Tensor,
    pixels: Tensor,
    query: Tensor,
    residual: Tensor | None,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    for_pixels: bool,
    for_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `pixels`, `query` and `residual`; the first and the last empty if not wanted."""
    query = query.contiguous()
    dtype = ieee_dtype(query.dtype, query.device)
    scaled = grad * rstd.unsqueeze(1)
    rows = _rows(query, residual).to(dtype)
    weights = (scaled if residual is None else torch.cat([scaled, grad], dim=1)).to(dtype)
    # The deviation's derivative is along f - mu.
    shrink = (grad * normalized).sum(dim=1) * rstd.square() / -pixels.shape[2]

    wanted = weights if for_residual else weights[:, : query.shape[1]]
    sums = torch.zeros_like(rows[:, : wanted.shape[1]])
    grad_pixels = torch.empty_like(pixels) if for_pixels else pixels.new_empty(0)
    with torch.autocast(pixels.device.type, enabled=False):
        for b, p in _blocks(pixels, whole=pixels.dtype == dtype):
            sums[b] += wanted[b, :, p] @ pixels[b, p].to(dtype)
        for b, p in _blocks(pixels) if for_pixels else ():
            target = grad_pixels[b, p]
            block = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
            torch.sub(pixels[b, p], mean[b, p, None], out=block).mul_(shrink[b, p, None])
            if rows.shape[1] > 4:
                block.baddbmm_(weights[b, :, p].mT, rows[b])
            else:  # faster, if the sum is short
                for n in range(rows.shape[1]):
                    block.addcmul_(weights[b, n, p, None], rows[b, n, None])
            if block is not target:
                target.copy_(block)
    grad_query = sums[:, : query.shape[1]] - (scaled * mean.unsqueeze(1)).sum(dim=2, keepdim=True)
    grad_residual = sums[:, query.shape[1] :].to(query.dtype).clone()
    return grad_pixels, grad_query.to(query.dtype), grad_residual


backward_op = torch.library.custom_op(
    "renyi_kd::scores_backward", gradients_by_blocks, mutates_args=()
)


@backward_op.register_fake
def _(
    grad: Tensor,
    pixels: Tensor,
    query: Tensor,
    residual: Tensor | None,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    for_pixels: bool,
    for_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(pixels) if for_pixels else pixels.new_empty(0),
        query.new_empty(query.shape),
        query.new_empty(query.shape[0], query.shape[1] if for_residual else 0, query.shape[2]),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pixels, query, residual, _, _ = inputs
    _, normalized, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pixels, query, residual, normalized, mean, rstd)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    for_pixels, _, for_residual, _, _ = ctx.needs_input_grad
    grad_pixels, grad_query, grad_residual = backward_op(
        grad, *ctx.saved_tensors, for_pixels, for_residual
    )
    return (
        grad_pixels if for_pixels else None,
        grad_query,
        grad_residual if for_residual else None,
        grad.sum(dim=2),
        None,
    )


op.register_autograd(_backward, setup_context=_save_for_backward)


def unit_length(scores: Tensor) -> Tensor:
    """Each sample of `(B, N, P)` divided by its length; a zero sample stays zero.

    The result has no second derivative.
    """
    relation: Tensor = _unit_length(scores)[0]
    return relation


@torch.library.custom_op("renyi_kd::unit_length", mutates_args=())
def _unit_length(scores: Tensor) -> tuple[Tensor, Tensor]:
    # In float64 neither large nor small features leave its range.
    length = torch.linalg.vector_norm(scores, dim=(1, 2), keepdim=True, dtype=torch.float64)
    length.masked_fill_(length == 0, 1.0)
    return (scores / length).to(scores.dtype), length


@_unit_length.register_fake
def _(scores: Tensor) -> tuple[Tensor, Tensor]:
    length = scores.new_empty(scores.shape[0], 1, 1, dtype=torch.float64)
    return torch.empty_like(scores), length


@torch.library.custom_op("renyi_kd::unit_length_backward", mutates_args=())
def _unit_length_backward(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    grad = grad.contiguous()
    along = (grad * relation).sum(dim=(1, 2), keepdim=True)
    return (torch.addcmul(grad, relation, along, value=-1) / length).to(grad.dtype)


@_unit_length_backward.register_fake
def _(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    return torch.empty_like(relation)


def _save_relation(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _backward_of_unit_length(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    return None if grad is None else _unit_length_backward(grad, *ctx.saved_tensors)


_unit_length.register_autograd(_backward_of_unit_length, setup_context=_save_relation)


def _blocks(pixels: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and of places that cut a map into blocks; one of each if `whole`."""
    samples, places, dim = pixels.shape
    if whole or not pixels.is_cpu:
        yield slice(None), slice(None)
        return
    samples_step = max(1, BLOCK // (places * dim))
    places_step = max(1, BLOCK // dim)
    for b in range(0, samples, samples_step):
        for p in range(0, places, places_step):
            yield slice(b, b + samples_step), slice(p, p + places_step)


def _rows(query: Tensor, residual: Tensor | None) -> Tensor:
    """What the pixels are multiplied with. A centred query does not feel their mean."""
    query = query - query.mean(dim=2, keepdim=True)
    return query if residual is None else torch.cat([query, residual], dim=1)


def _moments(pixels: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Fill in the mean and the variance of each pixel, of the mean first: no digits cancel."""
    if not pixels.is_cpu:
        of_variance, of_mean = torch.var_mean(pixels, dim=2, correction=0)
        variance.copy_(of_variance)
        mean.copy_(of_mean)
        return
    if pixels[:1].mT.is_contiguous():
        for sample, mu, var in zip(pixels, mean, variance, strict=True):
            # Of a (D, P) matrix, batch statistics are those of its columns; var_mean takes ten
            # times as long.
            moments = torch.ops.aten.batch_norm_update_stats(sample.mT, None, None, 0.0)
            mu.copy_(moments[0])
            var.copy_(moments[1])
        return
    torch.mean(pixels, dim=2, out=mean)
    scratch = pixels.new_empty(min(BLOCK, pixels.numel()))
    for b, p in _blocks(pixels):
        block = pixels[b, p]
        centred = scratch[: block.numel()].view_as(block)
        torch.sub(block, mean[b, p, None], out=centred)
        torch.linalg.vector_norm(centred, dim=2, out=variance[b, p])
    variance.square_().div_(pixels.shape[2])
