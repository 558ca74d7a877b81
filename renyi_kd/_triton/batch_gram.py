"""Gram matrices over a batch of rows in one launch or two, and their gradient in one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd._triton.launch import block_of, on_device_of
from renyi_kd.infosam.operators import batch_gram as operators

# The largest batch whose Gram matrix fits into a program's registers, and the largest for which a
# program keeps a sum for each feature of its block.
_MAX_BATCH = 64
_FEW = 16
# How many sums a program keeps: of products of float32, and of float64.
_SUMS = 16384
_EXACT_SUMS = 4096
# How many programs share the features of long rows, and the most products that one sum in float32
# takes before it is added to the others in float64.
_SPLITS = 256
_STEPS = 32
# How many products of matrices a tensor core adds up before they are added in float64. It cuts off
# digits where other units round, so that the errors of many would not average out.
_DEPTH = 32


@triton.jit
def _few_rows_kernel(
    rows,
    partial,
    B,
    K,
    stride,
    DTYPE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)[:, None, None]
    j = tl.arange(0, BLOCK_J)[None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]
    sums = tl.zeros((BLOCK_I, BLOCK_J, BLOCK_K), DTYPE)
    for start in range(split * BLOCK_K, K, tl.num_programs(0) * BLOCK_K):
        at = start + k
        x = tl.load(rows + i.to(tl.int64) * stride + at, mask=(i < B) & (at < K), other=0.0)
        y = tl.load(rows + j.to(tl.int64) * stride + at, mask=(j < B) & (at < K), other=0.0)
        sums += x.to(DTYPE) * y.to(DTYPE)
    total = tl.sum(sums.to(tl.float64), axis=2)
    row, column = first + tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_J)[None, :]
    to = partial + (split * B + row) * B + column
    tl.store(to, total, mask=(row < B) & (column < B))


@triton.jit
def _many_rows_kernel(
    rows,
    partial,
    B,
    K,
    stride,
    IN_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0)
    i = tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_B, BLOCK_B), tl.float64)
    mixed = tl.zeros((BLOCK_B, BLOCK_B), tl.float32)
    row_at = rows + i[:, None].to(tl.int64) * stride + k[None, :]
    there = (i < B)[:, None]
    following = tl.load(
        row_at + split * BLOCK_K, mask=there & (split * BLOCK_K + k < K)[None, :], other=0.0
    )
    step = tl.num_programs(0) * BLOCK_K
    for start in range(split * BLOCK_K, K, step):
        x = following.to(tl.float32)
        # Loaded before it is needed, so that the products do not wait for memory.
        inside = there & (start + step + k < K)[None, :]
        following = tl.load(row_at + start + step, mask=inside, other=0.0)
        high = x
        if IN_PARTS:
            # TF32 holds the rounded number and the rest of it. The square of the rest is nothing.
            bits = (x.to(tl.int32, bitcast=True) + 4096) & -8192
            high = bits.to(tl.float32, bitcast=True)
            mixed = tl.dot(high, tl.trans(x - high), acc=mixed, input_precision="tf32")
        total += tl.dot(high, tl.trans(high), input_precision="tf32").to(tl.float64)
    if IN_PARTS:
        total += (mixed + tl.trans(mixed)).to(tl.float64)
    to = partial + split * B * B + i[:, None] * B + i[None, :]
    tl.store(to, total, mask=(i < B)[:, None] & (i < B)[None, :])


@triton.jit
def _sum_kernel(partial, gram, SPLITS, SIZE, BLOCK_S: tl.constexpr, BLOCK_X: tl.constexpr):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    sums = tl.zeros((BLOCK_S, BLOCK_X), tl.float64)
    for start in range(0, SPLITS, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < SPLITS)[:, None] & (x < SIZE)[None, :]
        sums += tl.load(partial + s[:, None] * SIZE + x[None, :], mask=inside, other=0.0)
    tl.store(gram + x, tl.sum(sums, axis=0), mask=x < SIZE)


@triton.jit
def _gradient_kernel(
    grad_gram, rows, grad_rows, B, K, stride, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_B)
    gradient = tl.zeros((BLOCK_B, BLOCK_K), tl.float64)
    row_at = rows + k
    for j in range(B):
        row = tl.load(row_at, mask=k < K, other=0.0).to(tl.float64)
        row_at += stride
        weight = tl.load(grad_gram + i * B + j, mask=i < B, other=0.0)
        weight += tl.load(grad_gram + j * B + i, mask=i < B, other=0.0)
        gradient += weight[:, None] * row[None, :]
    to = grad_rows + i[:, None].to(tl.int64) * K + k[None, :]
    inside = (i < B)[:, None] & (k < K)[None, :]
    if grad_rows.dtype.element_ty != tl.float64:
        gradient = gradient.to(tl.float32)
    tl.store(to, gradient.to(grad_rows.dtype.element_ty), mask=inside)


def batch_gram_by_kernel(samples: Tensor) -> Tensor:
    """Do what `batch_gram.batch_gram_by_blocks` does, in one launch or two."""
    rows = _rows(samples)
    batch, features = rows.shape
    block = block_of(batch)
    long = operators.sums_in_chunks(samples)
    if long and batch > _FEW:
        partial = _parts(rows, min(_SPLITS, triton.cdiv(features, _DEPTH)))
        _many_rows_kernel[(len(partial),)](
            rows,
            partial,
            batch,
            features,
            rows.stride(0),
            IN_PARTS=rows.dtype == torch.float32,
            BLOCK_B=max(16, block),
            BLOCK_K=_DEPTH,
            num_warps=8,
        )
    else:
        block_i = block if long else 1
        block_k = max(32, (_SUMS if long else _EXACT_SUMS) // (block_i * block))
        steps = triton.cdiv(features, block_k)
        splits = max(min(_SPLITS, steps), triton.cdiv(steps, _STEPS)) if long else steps // 8
        partial = _parts(rows, max(1, splits))
        _few_rows_kernel[(len(partial), triton.cdiv(batch, block_i))](
            rows,
            partial,
            batch,
            features,
            rows.stride(0),
            DTYPE=tl.float32 if long else tl.float64,
            BLOCK_I=block_i,
            BLOCK_J=block,
            BLOCK_K=block_k,
        )
    if len(partial) == 1:
        return partial[0]
    gram = rows.new_empty(batch, batch, dtype=torch.float64)
    block_x = min(16, block_of(batch * batch))
    _sum_kernel[(triton.cdiv(batch * batch, block_x),)](
        partial, gram, len(partial), batch * batch, BLOCK_S=256, BLOCK_X=block_x, num_warps=8
    )
    return gram


def batch_gram_backward_by_kernel(grad_gram: Tensor, samples: Tensor) -> Tensor:
    """Do what `batch_gram.batch_gram_backward_by_blocks` does, in one launch."""
    rows = _rows(samples)
    batch, features = rows.shape
    gradient = operators.dense_in_memory_order(samples)
    block_k = max(32, _EXACT_SUMS // (4 * block_of(batch)))
    _gradient_kernel[(triton.cdiv(features, block_k),)](
        grad_gram.contiguous(),
        rows,
        gradient,
        batch,
        features,
        rows.stride(0),
        BLOCK_B=block_of(batch),
        BLOCK_K=block_k,
    )
    return gradient


def _rows(samples: Tensor) -> Tensor:
    rows = operators.in_memory_order(samples).flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _parts(rows: Tensor, number: int) -> Tensor:
    return rows.new_empty(number, rows.shape[0], rows.shape[0], dtype=torch.float64)


@operators.batch_gram_operator.register_kernel("cuda")
def _batch_gram_on_cuda(samples: Tensor) -> Tensor:
    if samples.shape[0] > _MAX_BATCH:
        return operators.batch_gram_by_blocks(samples)
    with on_device_of(samples):
        return batch_gram_by_kernel(samples)


@operators.batch_gram_backward_operator.register_kernel("cuda")
def _batch_gram_backward_on_cuda(grad_gram: Tensor, samples: Tensor) -> Tensor:
    if samples.shape[0] > _FEW:
        return operators.batch_gram_backward_by_blocks(grad_gram, samples)
    with on_device_of(samples):
        return batch_gram_backward_by_kernel(grad_gram, samples)
