"""The folded query of each token in two launches, and its gradients in three."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd._triton.launch import block_of, on_device_of
from renyi_kd.infosam.operators import folding as operators

# How many weights a program holds in registers at a time, and the most channels of a token.
_TILE = 8192
_MAX_DIM = 1024


@triton.jit
def _project_kernel(
    tokens,
    token_scale,
    token_shift,
    query_weight,
    query_bias,
    key_weight,
    key_bias,
    pixel_shift,
    normalized,
    mean,
    rstd,
    projected,
    partial_offset,
    D,
    eps,
    RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    real, inside = d < D, (o < D)[:, None] & (d < D)[None, :]
    of_query = tl.load(query_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    of_key = tl.load(key_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    token = tl.load(tokens + row * D + d, mask=real, other=0.0)
    mu = tl.sum(token, axis=0) / D
    centred = tl.where(real, token - mu, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    # Where the squares overflow, infinity minus itself makes the result NaN.
    reciprocal = 1 / tl.sqrt(variance + eps) + (variance - variance)
    scale = tl.load(token_scale + d, mask=real, other=0.0)
    unit = centred * reciprocal * scale + tl.load(token_shift + d, mask=real, other=0.0)

    bias = tl.load(query_bias + o, mask=o < D, other=0.0)
    value = (tl.sum(of_query * unit[None, :], axis=1) + bias) / tl.sqrt(D.to(tl.float32))
    tl.store(projected + row * D + o, value, mask=o < D)
    # The share of these channels in `folded @ pixel_shift + projected @ key_bias`.
    shift = tl.load(pixel_shift + d, mask=real, other=0.0)
    bias = tl.load(key_bias + o, mask=o < D, other=0.0)
    share = tl.sum(value * (tl.sum(of_key * shift[None, :], axis=1) + bias), axis=0)
    if block == 0:
        if RESIDUAL:
            share += tl.sum(unit * shift, axis=0)
        tl.store(mean + row, mu)
        tl.store(rstd + row, reciprocal)
        tl.store(normalized + row * D + d, unit, mask=real)
    tl.store(partial_offset + row * tl.num_programs(1) + block, share)


@triton.jit
def _fold_kernel(
    projected,
    normalized,
    key_weight,
    pixel_scale,
    partial_offset,
    query,
    folded,
    offset,
    D,
    BLOCKS,
    RESIDUAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.arange(0, BLOCK_O)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, inside = d < D, (o < D)[:, None] & (d < D)[None, :]
    weight = tl.load(key_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    value = tl.load(projected + row * D + o, mask=o < D, other=0.0)
    fold = tl.sum(value[:, None] * weight, axis=0)
    if RESIDUAL:
        fold += tl.load(normalized + row * D + d, mask=real, other=0.0)
    tl.store(folded + row * D + d, fold, mask=real)
    scale = tl.load(pixel_scale + d, mask=real, other=0.0)
    tl.store(query + row * D + d, fold * scale, mask=real)
    if block == 0:
        b = tl.arange(0, BLOCK_B)
        shares = tl.load(partial_offset + row * BLOCKS + b, mask=b < BLOCKS, other=0.0)
        tl.store(offset + row, tl.sum(shares, axis=0))


@triton.jit
def _grad_projected_kernel(
    grad_query,
    grad_offset,
    tokens,
    token_scale,
    query_weight,
    key_weight,
    key_bias,
    pixel_scale,
    pixel_shift,
    mean,
    rstd,
    grad_folded,
    grad_projected,
    partial_sums,
    D,
    RESIDUAL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    real, inside = d < D, (o < D)[:, None] & (d < D)[None, :]
    of_key = tl.load(key_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    of_query = tl.load(query_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    of_offset = tl.load(grad_offset + row)
    of_folded = tl.load(grad_query + row * D + d, mask=real, other=0.0)
    of_folded *= tl.load(pixel_scale + d, mask=real, other=0.0)
    of_folded += of_offset * tl.load(pixel_shift + d, mask=real, other=0.0)
    bias = tl.load(key_bias + o, mask=o < D, other=0.0)
    value = tl.sum(of_key * of_folded[None, :], axis=1) + of_offset * bias
    value /= tl.sqrt(D.to(tl.float32))
    tl.store(grad_projected + row * D + o, value, mask=o < D)

    # The shares of these channels in the two sums over all channels of a layer norm's backward.
    token = tl.load(tokens + row * D + d, mask=real, other=0.0)
    unit = tl.where(real, (token - tl.load(mean + row)) * tl.load(rstd + row), 0.0)
    scale = tl.load(token_scale + d, mask=real, other=0.0)
    share = tl.sum(value * tl.sum(of_query * scale[None, :], axis=1), axis=0)
    along = tl.sum(value * tl.sum(of_query * (scale * unit)[None, :], axis=1), axis=0)
    if block == 0:
        if RESIDUAL:
            share += tl.sum(of_folded * scale, axis=0)
            along += tl.sum(of_folded * scale * unit, axis=0)
        tl.store(grad_folded + row * D + d, of_folded, mask=real)
    to = partial_sums + (row * tl.num_programs(1) + block) * 2
    tl.store(to, share)
    tl.store(to + 1, along)


@triton.jit
def _grad_tokens_kernel(
    tokens,
    token_scale,
    query_weight,
    mean,
    rstd,
    grad_folded,
    grad_projected,
    partial_sums,
    grad_normalized,
    grad_tokens,
    D,
    BLOCKS,
    RESIDUAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.arange(0, BLOCK_O)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, inside = d < D, (o < D)[:, None] & (d < D)[None, :]
    weight = tl.load(query_weight + o[:, None] * D + d[None, :], mask=inside, other=0.0)
    value = tl.load(grad_projected + row * D + o, mask=o < D, other=0.0)
    of_normalized = tl.sum(value[:, None] * weight, axis=0)
    if RESIDUAL:
        of_normalized += tl.load(grad_folded + row * D + d, mask=real, other=0.0)
    tl.store(grad_normalized + row * D + d, of_normalized, mask=real)

    b = tl.arange(0, BLOCK_B)
    at = partial_sums + (row * BLOCKS + b) * 2
    total = tl.sum(tl.load(at, mask=b < BLOCKS, other=0.0), axis=0) / D
    along = tl.sum(tl.load(at + 1, mask=b < BLOCKS, other=0.0), axis=0) / D
    reciprocal = tl.load(rstd + row)
    token = tl.load(tokens + row * D + d, mask=real, other=0.0)
    unit = (token - tl.load(mean + row)) * reciprocal
    of_unit = of_normalized * tl.load(token_scale + d, mask=real, other=0.0)
    tl.store(grad_tokens + row * D + d, (of_unit - total - unit * along) * reciprocal, mask=real)


@triton.jit
def _grad_parameters_kernel(
    grad_query,
    grad_offset,
    tokens,
    normalized,
    mean,
    rstd,
    projected,
    folded,
    grad_folded,
    grad_projected,
    grad_normalized,
    grad_query_weight,
    grad_key_weight,
    grad_token_scale,
    grad_token_shift,
    grad_query_bias,
    grad_key_bias,
    grad_pixel_scale,
    grad_pixel_shift,
    ROWS,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.arange(0, BLOCK_D)
    of_query_weight = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    of_key_weight = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    of_token_scale = tl.zeros((BLOCK_O,), tl.float32)
    of_token_shift = tl.zeros((BLOCK_O,), tl.float32)
    of_query_bias = tl.zeros((BLOCK_O,), tl.float32)
    of_key_bias = tl.zeros((BLOCK_O,), tl.float32)
    of_pixel_scale = tl.zeros((BLOCK_O,), tl.float32)
    of_pixel_shift = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        there = r < ROWS
        narrow, at = there[:, None] & (o < D)[None, :], r[:, None] * D + o[None, :]
        wide, across = there[:, None] & (d < D)[None, :], r[:, None] * D + d[None, :]
        g_projected = tl.load(grad_projected + at, mask=narrow, other=0.0)
        p = tl.load(projected + at, mask=narrow, other=0.0)
        unit = tl.load(normalized + across, mask=wide, other=0.0)
        g_folded = tl.load(grad_folded + across, mask=wide, other=0.0)
        of_query_weight += tl.sum(g_projected[:, :, None] * unit[:, None, :], axis=0)
        of_key_weight += tl.sum(p[:, :, None] * g_folded[:, None, :], axis=0)

        g_offset = tl.load(grad_offset + r, mask=there, other=0.0)[:, None]
        f = tl.load(folded + at, mask=narrow, other=0.0)
        g_normalized = tl.load(grad_normalized + at, mask=narrow, other=0.0)
        token = tl.load(tokens + at, mask=narrow, other=0.0)
        mu = tl.load(mean + r, mask=there, other=0.0)[:, None]
        reciprocal = tl.load(rstd + r, mask=there, other=0.0)[:, None]
        of_token_scale += tl.sum(g_normalized * (token - mu) * reciprocal, axis=0)
        of_token_shift += tl.sum(g_normalized, axis=0)
        of_query_bias += tl.sum(g_projected, axis=0)
        of_key_bias += tl.sum(g_offset * p, axis=0)
        of_query = tl.load(grad_query + at, mask=narrow, other=0.0)
        of_pixel_scale += tl.sum(of_query * f, axis=0)
        of_pixel_shift += tl.sum(g_offset * f, axis=0)
    inside = (o < D)[:, None] & (d < D)[None, :]
    tl.store(grad_query_weight + o[:, None] * D + d[None, :], of_query_weight, mask=inside)
    tl.store(grad_key_weight + o[:, None] * D + d[None, :], of_key_weight, mask=inside)
    tl.store(grad_token_scale + o, of_token_scale, mask=o < D)
    tl.store(grad_token_shift + o, of_token_shift, mask=o < D)
    tl.store(grad_query_bias + o, of_query_bias, mask=o < D)
    tl.store(grad_key_bias + o, of_key_bias, mask=o < D)
    tl.store(grad_pixel_scale + o, of_pixel_scale, mask=o < D)
    tl.store(grad_pixel_shift + o, of_pixel_shift, mask=o < D)


def fold_by_kernel(
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
    """Do what `folding.fold_by_operators` does, in two launches, of contiguous tensors."""
    dim, rows = tokens.shape[2], tokens.shape[:2].numel()
    query, normalized, projected, folded = (tokens.new_empty(tokens.shape) for _ in range(4))
    offset = tokens.new_empty(tokens.shape[:2])
    mean, rstd = (tokens.new_empty(*tokens.shape[:2], 1) for _ in range(2))
    block, blocks = _blocks(dim)
    partial_offset = tokens.new_empty(rows, blocks)
    _project_kernel[(rows, blocks)](
        tokens,
        token_scale,
        token_shift,
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        pixel_shift,
        normalized,
        mean,
        rstd,
        projected,
        partial_offset,
        dim,
        eps,
        RESIDUAL=residual,
        BLOCK_O=block,
        BLOCK_D=block_of(dim),
        num_warps=8,
    )
    _fold_kernel[(rows, blocks)](
        projected,
        normalized,
        key_weight,
        pixel_scale,
        partial_offset,
        query,
        folded,
        offset,
        dim,
        blocks,
        RESIDUAL=residual,
        BLOCK_B=block_of(blocks),
        BLOCK_O=block_of(dim),
        BLOCK_D=block,
        num_warps=8,
    )
    return query, offset, normalized, mean, rstd, projected, folded


def fold_backward_by_kernel(
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
    """Do what `folding.fold_backward_by_operators` does, in three launches."""
    dim, rows = tokens.shape[2], grad_offset.numel()
    of_folded, of_projected, of_normalized, grad_tokens = (
        tokens.new_empty(tokens.shape) for _ in range(4)
    )
    block, blocks = _blocks(dim)
    partial_sums = tokens.new_empty(rows, blocks, 2)
    _grad_projected_kernel[(rows, blocks)](
        grad_query,
        grad_offset,
        tokens,
        token_scale,
        query_weight,
        key_weight,
        key_bias,
        pixel_scale,
        pixel_shift,
        mean,
        rstd,
        of_folded,
        of_projected,
        partial_sums,
        dim,
        RESIDUAL=residual,
        BLOCK_O=block,
        BLOCK_D=block_of(dim),
        num_warps=8,
    )
    _grad_tokens_kernel[(rows, blocks)](
        tokens,
        token_scale,
        query_weight,
        mean,
        rstd,
        of_folded,
        of_projected,
        partial_sums,
        of_normalized,
        grad_tokens,
        dim,
        blocks,
        RESIDUAL=residual,
        BLOCK_B=block_of(blocks),
        BLOCK_O=block_of(dim),
        BLOCK_D=block,
        num_warps=8,
    )
    grad_query_weight, grad_key_weight = (tokens.new_empty(dim, dim) for _ in range(2))
    of_scale, of_shift, of_query_bias, of_key_bias, of_pixel_scale, of_pixel_shift = (
        tokens.new_empty(dim) for _ in range(6)
    )
    block_r = min(8, block_of(rows))
    block_o = max(1, _TILE // (block_r * block_of(dim)))
    _grad_parameters_kernel[(triton.cdiv(dim, block_o),)](
        grad_query,
        grad_offset,
        tokens,
        normalized,
        mean,
        rstd,
        projected,
        folded,
        of_folded,
        of_projected,
        of_normalized,
        grad_query_weight,
        grad_key_weight,
        of_scale,
        of_shift,
        of_query_bias,
        of_key_bias,
        of_pixel_scale,
        of_pixel_shift,
        rows,
        dim,
        BLOCK_R=block_r,
        BLOCK_O=block_o,
        BLOCK_D=block_of(dim),
        num_warps=8,
    )
    return (
        grad_tokens,
        of_scale,
        of_shift,
        grad_query_weight,
        of_query_bias,
        grad_key_weight,
        of_key_bias,
        of_pixel_scale,
        of_pixel_shift,
    )


def _blocks(dim: int) -> tuple[int, int]:
    """Return how many rows of a weight a program holds, and how many programs hold all of them."""
    block = min(_TILE // block_of(dim), block_of(dim))
    blocks: int = triton.cdiv(dim, block)
    return block, blocks


def _fits(tokens: Tensor) -> bool:
    return tokens.dtype == torch.float32 and tokens.shape[2] <= _MAX_DIM


@operators.fold_operator.register_kernel("cuda")
def _fold_on_cuda(
    tokens: Tensor, *parameters_and_options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    route = fold_by_kernel if _fits(tokens) else operators.fold_by_operators
    with on_device_of(tokens):
        return route(*map(_contiguous, (tokens, *parameters_and_options)))


@operators.fold_backward_operator.register_kernel("cuda")
def _fold_backward_on_cuda(
    grad_query: Tensor, grad_offset: Tensor, tokens: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    route = fold_backward_by_kernel if _fits(tokens) else operators.fold_backward_by_operators
    with on_device_of(tokens):
        return route(*map(_contiguous, (grad_query, grad_offset, tokens, *saved)))


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x
