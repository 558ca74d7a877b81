"""The scores with one read of the map, their gradient with one read and one write, and lengths."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd._triton.launch import block_of, on_device_of
from renyi_kd.infosam.operators import scores as operators

# How many elements of a map one program holds in registers at a time, forward and backward.
_TILE = 16384
_BACKWARD_TILE = 8192
# How many programs share the pixels of a sample in backward: so many that all samples make about a
# thousand of them. Their sums are added up afterwards, in the same order in every run.
_PROGRAMS = 1024
_MOST_SPLITS, _FEWEST_SPLITS = 64, 16
# The largest number of tokens that a program unrolls.
_MAX_TOKENS = 16


@triton.jit
def _scores_kernel(
    pixels,
    query,
    residual,
    offset,
    scores,
    normalized,
    mean,
    rstd,
    P,
    D,
    eps,
    stride_b,
    stride_p,
    stride_d,
    N: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    inside = (p < P)[:, None] & (d < D)[None, :]
    at = pixels + b * stride_b + p[:, None] * stride_p + d[None, :] * stride_d
    f = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(f, axis=1) / D
    centred = tl.where(inside, f - mu[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    # Where the squares overflow, 1 / infinity = 0 would pass for that of a constant pixel. Infinity
    # minus itself makes it NaN.
    reciprocal = 1 / tl.sqrt(variance + eps) + (variance - variance)
    tl.store(mean + b * P + p, mu, mask=p < P)
    tl.store(rstd + b * P + p, reciprocal, mask=p < P)
    for n in range(N):
        row = b * N + n
        w = tl.load(query + row * D + d, mask=d < D, other=0.0)
        w = tl.where(d < D, w - tl.sum(w, axis=0) / D, 0.0)
        score = tl.sum(centred * w[None, :], axis=1) * reciprocal
        tl.store(normalized + row * P + p, score, mask=p < P)
        if RAW:
            v = tl.load(residual + row * D + d, mask=d < D, other=0.0)
            score += tl.sum(f * v[None, :], axis=1)
        tl.store(scores + row * P + p, score + tl.load(offset + row), mask=p < P)


@triton.jit
def _scores_backward_kernel(
    grad,
    pixels,
    query,
    residual,
    normalized,
    mean,
    rstd,
    grad_pixels,
    partial_query,
    partial_residual,
    partial_offset,
    P,
    D,
    stride_b,
    stride_p,
    stride_d,
    grad_stride_b,
    grad_stride_p,
    grad_stride_d,
    N: tl.constexpr,
    RAW: tl.constexpr,
    FOR_PIXELS: tl.constexpr,
    FOR_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    tokens = tl.arange(0, BLOCK_N)
    sum_query = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_residual = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_offset = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * BLOCK_P, P, tl.num_programs(0) * BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (d < D)[None, :]
        at = pixels + b * stride_b + p[:, None] * stride_p + d[None, :] * stride_d
        f = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + b * P + p, mask=p < P, other=0.0)
        reciprocal = tl.load(rstd + b * P + p, mask=p < P, other=0.0)
        centred = tl.where(inside, f - mu[:, None], 0.0)
        shrink = tl.zeros((BLOCK_P,), tl.float32)
        gradient = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for n in range(N):
            row = b * N + n
            g = tl.load(grad + row * P + p, mask=p < P, other=0.0)
            scaled = g * reciprocal
            sum_offset += tl.where(tokens == n, tl.sum(g, axis=0), 0.0)
            shrink += g * tl.load(normalized + row * P + p, mask=p < P, other=0.0)
            of_query = tl.sum(scaled[:, None] * centred, axis=0)
            sum_query += tl.where(tokens[:, None] == n, of_query[None, :], 0.0)
            if FOR_RESIDUAL:
                of_residual = tl.sum(g[:, None] * f, axis=0)
                sum_residual += tl.where(tokens[:, None] == n, of_residual[None, :], 0.0)
            if FOR_PIXELS:
                w = tl.load(query + row * D + d, mask=d < D, other=0.0)
                w = tl.where(d < D, w - tl.sum(w, axis=0) / D, 0.0)
                gradient += scaled[:, None] * w[None, :]
                if RAW:
                    v = tl.load(residual + row * D + d, mask=d < D, other=0.0)
                    gradient += g[:, None] * v[None, :]
        if FOR_PIXELS:
            gradient -= (shrink * reciprocal * reciprocal / D)[:, None] * centred
            to = grad_pixels + b * grad_stride_b + p[:, None] * grad_stride_p
            to += d[None, :] * grad_stride_d
            tl.store(to, gradient.to(grad_pixels.dtype.element_ty), mask=inside)
    row = (b * tl.num_programs(0) + split) * N + tokens
    to = row[:, None] * D + d[None, :]
    stored = (tokens < N)[:, None] & (d < D)[None, :]
    tl.store(partial_query + to, sum_query, mask=stored)
    tl.store(partial_offset + row, sum_offset, mask=tokens < N)
    if FOR_RESIDUAL:
        tl.store(partial_residual + to, sum_residual, mask=stored)


@triton.jit
def _sum_kernel(
    partial_query,
    partial_residual,
    partial_offset,
    grad_query,
    grad_residual,
    grad_offset,
    N,
    D,
    SPLITS: tl.constexpr,
    FOR_RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = ((row // N) * SPLITS + s) * N + row % N
    at, inside = part[:, None] * D + d[None, :], (s < SPLITS)[:, None] & (d < D)[None, :]
    of_query = tl.sum(tl.load(partial_query + at, mask=inside, other=0.0), axis=0)
    tl.store(grad_query + row * D + d, of_query, mask=d < D)
    if FOR_RESIDUAL:
        of_residual = tl.sum(tl.load(partial_residual + at, mask=inside, other=0.0), axis=0)
        tl.store(grad_residual + row * D + d, of_residual, mask=d < D)
    if tl.program_id(1) == 0:
        of_offset = tl.load(partial_offset + part, mask=s < SPLITS, other=0.0)
        tl.store(grad_offset + row, tl.sum(of_offset, axis=0))


@triton.jit
def _unit_length_kernel(scores, relation, length, SIZE, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # In float64 the squares of large and of small features stay within the range.
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(scores + sample * SIZE + start + at, mask=start + at < SIZE, other=0.0)
        squares += x.to(tl.float64) * x.to(tl.float64)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    norm = tl.where(norm == 0, 1.0, norm)
    tl.store(length + sample, norm)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(scores + sample * SIZE + start + at, mask=start + at < SIZE, other=0.0)
        divided = (x.to(tl.float64) / norm).to(relation.dtype.element_ty)
        tl.store(relation + sample * SIZE + start + at, divided, mask=start + at < SIZE)


@triton.jit
def _unit_length_backward_kernel(grad, relation, length, grad_scores, SIZE, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    products = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, SIZE, BLOCK):
        to = sample * SIZE + start + at
        g = tl.load(grad + to, mask=start + at < SIZE, other=0.0)
        r = tl.load(relation + to, mask=start + at < SIZE, other=0.0)
        products += g.to(tl.float64) * r.to(tl.float64)
    along = tl.sum(products, axis=0)
    norm = tl.load(length + sample)
    for start in range(0, SIZE, BLOCK):
        to = sample * SIZE + start + at
        g = tl.load(grad + to, mask=start + at < SIZE, other=0.0)
        r = tl.load(relation + to, mask=start + at < SIZE, other=0.0)
        across = (g.to(tl.float64) - along * r.to(tl.float64)) / norm
        tl.store(grad_scores + to, across.to(grad_scores.dtype.element_ty), mask=start + at < SIZE)


def scores_by_kernel(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `scores.scores_by_blocks` does, in one launch."""
    batch, places, dim = pixels.shape
    tokens = query.shape[1]
    out, normalized = (query.new_empty(batch, tokens, places) for _ in range(2))
    mean, rstd = (query.new_empty(batch, places) for _ in range(2))
    query = query.contiguous()
    block_p, block_d = _tile(_TILE, places, dim)
    _scores_kernel[(triton.cdiv(places, block_p), batch)](
        pixels,
        query,
        query if residual is None else residual.contiguous(),
        offset.contiguous(),
        out,
        normalized,
        mean,
        rstd,
        places,
        dim,
        eps,
        *pixels.stride(),
        N=tokens,
        RAW=residual is not None,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
    )
    return out, normalized, mean, rstd


def scores_backward_by_kernel(
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
    """Do what `scores.scores_backward_by_blocks` does, in two launches."""
    batch, places, dim = pixels.shape
    tokens = query.shape[1]
    block_p, block_d = _tile(_BACKWARD_TILE, places, dim)
    splits = min(_splits(batch), triton.cdiv(places, block_p))
    grad_pixels = torch.empty_like(pixels) if for_pixels else pixels.new_empty(0)
    partial_query = query.new_empty(batch, splits, tokens, dim)
    partial_residual = query.new_empty(batch, splits, tokens if for_residual else 0, dim)
    partial_offset = query.new_empty(batch, splits, tokens)
    query = query.contiguous()
    _scores_backward_kernel[(splits, batch)](
        grad.contiguous(),
        pixels,
        query,
        query if residual is None else residual.contiguous(),
        normalized.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        grad_pixels,
        partial_query,
        partial_residual,
        partial_offset,
        places,
        dim,
        *pixels.stride(),
        *(grad_pixels.stride() if for_pixels else (0, 0, 0)),
        N=tokens,
        RAW=residual is not None,
        FOR_PIXELS=for_pixels,
        FOR_RESIDUAL=for_residual,
        BLOCK_N=block_of(tokens),
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=4 if for_pixels else 8,
    )
    grad_query, grad_offset = query.new_empty(query.shape), query.new_empty(batch, tokens)
    grad_residual = query.new_empty(batch, tokens if for_residual else 0, dim)
    block_d = min(64, block_d)
    _sum_kernel[(batch * tokens, triton.cdiv(dim, block_d))](
        partial_query,
        partial_residual,
        partial_offset,
        grad_query,
        grad_residual,
        grad_offset,
        tokens,
        dim,
        SPLITS=splits,
        FOR_RESIDUAL=for_residual,
        BLOCK_S=block_of(splits),
        BLOCK_D=block_d,
    )
    return grad_pixels, grad_query, grad_residual, grad_offset


def unit_length_by_kernel(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `scores.unit_length_by_operators` does, in one launch."""
    batch, size = scores.shape[0], scores.shape[1:].numel()
    scores, relation = scores.contiguous(), scores.new_empty(scores.shape)
    length = scores.new_empty(batch, 1, 1, dtype=torch.float64)
    _unit_length_kernel[(batch,)](
        scores, relation, length, size, BLOCK=min(4096, block_of(size)), num_warps=8
    )
    return relation, length


def unit_length_backward_by_kernel(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    """Do what `scores.unit_length_backward_by_operators` does, in one launch."""
    batch, size = relation.shape[0], relation.shape[1:].numel()
    relation, grad_scores = relation.contiguous(), relation.new_empty(relation.shape)
    _unit_length_backward_kernel[(batch,)](
        grad.contiguous(),
        relation,
        length.contiguous(),
        grad_scores,
        size,
        BLOCK=min(4096, block_of(size)),
        num_warps=8,
    )
    return grad_scores


def _tile(elements: int, places: int, dim: int) -> tuple[int, int]:
    block_d = block_of(dim)
    return min(max(1, elements // block_d), block_of(places)), block_d


def _splits(batch: int) -> int:
    return min(_MOST_SPLITS, max(_FEWEST_SPLITS, _PROGRAMS // max(1, batch)))


def _scores_fit(pixels: Tensor, query: Tensor) -> bool:
    tokens, dim = query.shape[1:]
    accumulator = block_of(tokens) * block_of(dim)
    fits = accumulator <= _BACKWARD_TILE and tokens <= _MAX_TOKENS
    return fits and query.dtype == torch.float32


@operators.scores_operator.register_kernel("cuda")
def _scores_on_cuda(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    route = scores_by_kernel if _scores_fit(pixels, query) else operators.scores_by_blocks
    with on_device_of(pixels):
        return route(pixels, query, residual, offset, eps)


@operators.scores_backward_operator.register_kernel("cuda")
def _scores_backward_on_cuda(
    grad: Tensor, pixels: Tensor, query: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fits = _scores_fit(pixels, query)
    route = scores_backward_by_kernel if fits else operators.scores_backward_by_blocks
    with on_device_of(pixels):
        return route(grad, pixels, query, *saved)


@operators.unit_length_operator.register_kernel("cuda")
def _unit_length_on_cuda(scores: Tensor) -> tuple[Tensor, Tensor]:
    with on_device_of(scores):
        return unit_length_by_kernel(scores)


@operators.unit_length_backward_operator.register_kernel("cuda")
def _unit_length_backward_on_cuda(grad: Tensor, relation: Tensor, length: Tensor) -> Tensor:
    with on_device_of(relation):
        return unit_length_backward_by_kernel(grad, relation, length)
