r"""Relation scores from the image embedding as it is (InfoSAM, Eq. 8 and 9, folded).

The textbook form normalises and projects every pixel. With the key projection and the layer norm's
scale folded into the query :math:`w` and the offset :math:`c` of a token (see `folding`), neither
is needed. The score of a pixel :math:`f_p` is

.. math:: \frac{w \cdot (f_p - \mu_p)}{\sigma_p} + c

Only the pixel's mean, its standard deviation and its inner product with :math:`w` are needed.
Nothing as large as the map is written or kept but its gradient.

The PyTorch form below reads the map once for the moments and once for the products. The Triton
kernel of the same operator reads it once in all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import exact_dtype, ieee_dtype

# How many elements of a map a loop takes at a time on a CPU. A megabyte of float32 stays in the
# cache for the passes after the first, and takes long compared to the overhead of a call.
BLOCK = 2**18


def relation_scores(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> Tensor:
    r"""Return the scores :math:`w_n \cdot (f_p - \mu_p) / \sigma_p + v_n \cdot f_p + c_n`.

    Args:
        pixels: :math:`f`, shape `(B, P, D)`, of any strides and floating-point dtype.
        query: :math:`w`, shape `(B, N, D)`, float32 or float64.
        residual: :math:`v`, shape `(B, N, D)`, in the dtype of `query`, or None.
        offset: :math:`c`, shape `(B, N)`, in the dtype of `query`.
        eps: what is added to a pixel's variance.

    Returns:
        Scores, shape `(B, N, P)`, in the dtype of `query`. They have no second derivative.
    """
    scores: Tensor = scores_operator(pixels, query, residual, offset, eps)[0]
    return scores


def scores_by_blocks(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `relation_scores` does, and what backward needs.

    That is the first term of the scores, and the mean and 1 / standard deviation of each pixel.
    """
    dtype = ieee_dtype(query.dtype, query.device)
    rows = _centred_query_and_residual(query, residual).to(dtype)
    products = rows.new_empty(*rows.shape[:2], pixels.shape[1])
    mean, variance = rows.new_empty(pixels.shape[:2]), rows.new_empty(pixels.shape[:2])
    with torch.autocast(pixels.device.type, enabled=False):
        # Without a conversion there is nothing to keep in the cache, and the map is one block.
        for samples, places in _blocks(pixels, whole=pixels.dtype == dtype):
            block = pixels[samples, places].to(dtype)
            _fill_in_moments(block, mean[samples, places], variance[samples, places])
            if block.stride(2) == 1:
                products[samples, :, places] = (block @ rows[samples].mT).mT
            else:
                products[samples, :, places] = rows[samples] @ block.mT
    # Where the squares overflow, 1 / infinity = 0 would pass for that of a constant pixel.
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


scores_operator = torch.library.custom_op("renyi_kd::scores", scores_by_blocks, mutates_args=())


@scores_operator.register_fake
def _scores_shapes(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = query.new_empty(*query.shape[:2], pixels.shape[1])
    mean = query.new_empty(pixels.shape[:2])
    return scores, torch.empty_like(scores), mean, torch.empty_like(mean)


def scores_backward_by_blocks(
    grad: Tensor,
    pixels: Tensor,
    query: Tensor,
    residual: Tensor | None,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    for_pixels: bool,
    for_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `pixels`, `query`, `residual` and `offset`.

    The first and the third are empty unless `for_pixels` and `for_residual` ask for them.
    """
    query = query.contiguous()
    dtype = ieee_dtype(query.dtype, query.device)
    scaled = grad * rstd.unsqueeze(1)
    rows = _centred_query_and_residual(query, residual).to(dtype)
    weights = (scaled if residual is None else torch.cat([scaled, grad], dim=1)).to(dtype)
    # The derivative of the standard deviation is along f - mu.
    shrink = (grad * normalized).sum(dim=1) * rstd.square() / -pixels.shape[2]

    wanted = weights if for_residual else weights[:, : query.shape[1]]
    sums = torch.zeros_like(rows[:, : wanted.shape[1]])
    grad_pixels = torch.empty_like(pixels) if for_pixels else pixels.new_empty(0)
    with torch.autocast(pixels.device.type, enabled=False):
        for samples, places in _blocks(pixels, whole=pixels.dtype == dtype):
            sums[samples] += wanted[samples, :, places] @ pixels[samples, places].to(dtype)
        for samples, places in _blocks(pixels) if for_pixels else ():
            target = grad_pixels[samples, places]
            block = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
            torch.sub(pixels[samples, places], mean[samples, places, None], out=block)
            block.mul_(shrink[samples, places, None])
            if rows.shape[1] > 4:
                block.baddbmm_(weights[samples, :, places].mT, rows[samples])
            else:  # a sum of few terms is faster term by term
                for n in range(rows.shape[1]):
                    block.addcmul_(weights[samples, n, places, None], rows[samples, n, None])
            if block is not target:
                target.copy_(block)
    grad_query = sums[:, : query.shape[1]] - (scaled * mean.unsqueeze(1)).sum(dim=2, keepdim=True)
    grad_residual = sums[:, query.shape[1] :].to(query.dtype).clone()
    return grad_pixels, grad_query.to(query.dtype), grad_residual, grad.sum(dim=2)


scores_backward_operator = torch.library.custom_op(
    "renyi_kd::scores_backward", scores_backward_by_blocks, mutates_args=()
)


@scores_backward_operator.register_fake
def _scores_backward_shapes(
    grad: Tensor,
    pixels: Tensor,
    query: Tensor,
    residual: Tensor | None,
    normalized: Tensor,
    mean: Tensor,
    rstd: Tensor,
    for_pixels: bool,
    for_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(pixels) if for_pixels else pixels.new_empty(0),
        query.new_empty(query.shape),
        query.new_empty(query.shape[0], query.shape[1] if for_residual else 0, query.shape[2]),
        query.new_empty(query.shape[:2]),
    )


def _save_pixels(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pixels, query, residual, _, _ = inputs
    _, normalized, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pixels, query, residual, normalized, mean, rstd)


def _gradients_of_scores(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    for_pixels, _, for_residual, _, _ = ctx.needs_input_grad
    grad_pixels, grad_query, grad_residual, grad_offset = scores_backward_operator(
        grad, *ctx.saved_tensors, for_pixels, for_residual
    )
    return (
        grad_pixels if for_pixels else None,
        grad_query,
        grad_residual if for_residual else None,
        grad_offset,
        None,
    )


scores_operator.register_autograd(_gradients_of_scores, setup_context=_save_pixels)


def unit_length(scores: Tensor) -> Tensor:
    """Return each sample of `(B, N, P)` divided by its length. A zero sample stays zero.

    The result has no second derivative.
    """
    if needs_plain_formulas(scores):
        squares = scores.to(exact_dtype(scores.device)).square().sum(dim=(1, 2), keepdim=True)
        return (scores / torch.where(squares == 0, 1.0, squares).sqrt()).to(scores.dtype)
    relation: Tensor = unit_length_operator(scores)[0]
    return relation


def unit_length_by_operators(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples of unit length, and their lengths before, `(B, 1, 1)` in float64."""
    # In float64 the squares of large and of small features stay within the range.
    dtype = exact_dtype(scores.device)
    length = torch.linalg.vector_norm(scores, dim=(1, 2), keepdim=True, dtype=dtype)
    length.masked_fill_(length == 0, 1.0)
    return (scores / length).to(scores.dtype).contiguous(), length


unit_length_operator = torch.library.custom_op(
    "renyi_kd::unit_length", unit_length_by_operators, mutates_args=()
)


@unit_length_operator.register_fake
def _unit_length_shapes(scores: Tensor) -> tuple[Tensor, Tensor]:
    length = scores.new_empty(scores.shape[0], 1, 1, dtype=exact_dtype(scores.device))
    return scores.new_empty(scores.shape), length


def unit_length_backward_by_operators(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    """Return the gradient of the scores."""
    grad, relation = grad.contiguous(), relation.contiguous()
    along = (grad * relation).sum(dim=(1, 2), keepdim=True)
    return (torch.addcmul(grad, relation, along, value=-1) / length).to(grad.dtype)


unit_length_backward_operator = torch.library.custom_op(
    "renyi_kd::unit_length_backward", unit_length_backward_by_operators, mutates_args=()
)


@unit_length_backward_operator.register_fake
def _unit_length_backward_shape(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    return relation.new_empty(relation.shape)


def _save_relation(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _gradient_of_unit_length(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    return None if grad is None else unit_length_backward_operator(grad, *ctx.saved_tensors)


unit_length_operator.register_autograd(_gradient_of_unit_length, setup_context=_save_relation)


def _blocks(pixels: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Yield the samples and the places of each block of a map; all of them at once if `whole`."""
    if whole or not pixels.is_cpu:
        yield slice(None), slice(None)
        return
    batch, places, dim = pixels.shape
    samples_at_once = max(1, BLOCK // (places * dim))
    places_at_once = max(1, BLOCK // dim)
    for sample in range(0, batch, samples_at_once):
        for place in range(0, places, places_at_once):
            yield slice(sample, sample + samples_at_once), slice(place, place + places_at_once)


def _centred_query_and_residual(query: Tensor, residual: Tensor | None) -> Tensor:
    """Return the vectors that the pixels are multiplied with, `(B, N or 2N, D)`.

    A query whose entries have the mean zero has the same product with f as with f - mu.
    """
    query = query - query.mean(dim=2, keepdim=True)
    return query if residual is None else torch.cat([query, residual], dim=1)


def _fill_in_moments(pixels: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Fill in the mean and the variance of each pixel.

    The variance is that of the differences from the mean, so that no digits cancel where the mean
    is large.
    """
    if not pixels.is_cpu:
        variances, means = torch.var_mean(pixels, dim=2, correction=0)
        variance.copy_(variances)
        mean.copy_(means)
        return
    if pixels[:1].mT.is_contiguous():
        for i, sample in enumerate(pixels):
            # Batch norm over a (D, P) matrix takes its statistics over the D values of each pixel.
            # var_mean does the same and takes ten times as long.
            moments = torch.ops.aten.batch_norm_update_stats(sample.mT, None, None, 0.0)
            mean[i], variance[i] = moments
        return
    torch.mean(pixels, dim=2, out=mean)
    scratch = pixels.new_empty(min(BLOCK, pixels.numel()))
    for samples, places in _blocks(pixels):
        block = pixels[samples, places]
        centred = scratch[: block.numel()].view_as(block)
        torch.sub(block, mean[samples, places, None], out=centred)
        torch.linalg.vector_norm(centred, dim=2, out=variance[samples, places])
    variance.square_().div_(pixels.shape[2])
