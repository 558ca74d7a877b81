"""Triton kernels for CUDA.

They read each map once, and decompose a stack of small matrices in one launch. Importing this
module registers them with the operators they serve. The PyTorch forms stay what a CPU runs, what
serves where a kernel cannot, and the reference of the kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd.information.routes import eigenvalues
from renyi_kd.infosam.operators import batch_gram, joint, scores

# How many elements of a map one program holds in registers at a time.
_TILE = 8192
# How many programs share the pixels of a sample in backward, and the features of a batch in a Gram
# matrix. Their sums are added up afterwards, in the same order in every run.
_PIXEL_SPLITS = 32
_FEATURE_SPLITS = 256
# The largest number of tokens that a program unrolls, and the largest batch that fits into its
# registers.
_MAX_TOKENS = 16
_MAX_BATCH = 64

# The number of Jacobi sweeps after which matrices of a size are diagonal to rounding. Repeated
# eigenvalues need the most.
_SWEEPS = {1: 0, 2: 2, 4: 8, 8: 11, 16: 16, 32: 21}


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
    if FOR_RESIDUAL:
        tl.store(partial_residual + to, sum_residual, mask=stored)


@triton.jit
def _gram_kernel(
    rows,
    partial,
    B,
    K,
    stride,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0)
    i = tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_B, BLOCK_B), tl.float64)
    for start in range(split * BLOCK_K, K, tl.num_programs(0) * BLOCK_K):
        at = start + k
        inside = (i < B)[:, None] & (at < K)[None, :]
        x = tl.load(rows + i[:, None].to(tl.int64) * stride + at[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        total += tl.dot(x, tl.trans(x), input_precision="ieee").to(tl.float64)
    to = partial + split * B * B + i[:, None] * B + i[None, :]
    tl.store(to, total, mask=(i < B)[:, None] & (i < B)[None, :])


@triton.jit
def _cosine(grams, which, n, BLOCK: tl.constexpr):
    """Return the cosines of one of the raw Gram matrices, and 1 / length of its samples."""
    i = tl.arange(0, BLOCK)
    gram = grams + which * n * n
    diagonal = tl.load(gram + i * (n + 1), mask=i < n, other=1.0)
    zero = diagonal == 0
    scale = tl.where(zero, 0.0, 1 / tl.sqrt(diagonal))
    inside = (i < n)[:, None] & (i < n)[None, :]
    raw = tl.load(gram + i[:, None] * n + i[None, :], mask=inside, other=0.0)
    zero_pairs = tl.where(zero[:, None] & zero[None, :], 1.0, 0.0)
    return raw * scale[:, None] * scale[None, :] + zero_pairs, scale


@triton.jit
def _joint_kernel(grams, joint, n, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    teacher, _ = _cosine(grams, 0, n, BLOCK)
    student, _ = _cosine(grams, 1, n, BLOCK)
    image, _ = _cosine(grams, 2, n, BLOCK)
    tokens, _ = _cosine(grams, 3, n, BLOCK)
    product = teacher
    product = tl.where(which == 1, student, product)
    product = tl.where(which == 2, image * tokens, product)
    product = tl.where(which == 3, image * tokens * teacher, product)
    product = tl.where(which == 4, teacher * student, product)
    at = tl.arange(0, BLOCK)
    to = joint + which * n * n + at[:, None] * n + at[None, :]
    tl.store(to, product / n, mask=(at < n)[:, None] & (at < n)[None, :])


@triton.jit
def _joint_backward_kernel(
    grad_joint, grams, grad_grams, n, TRAINS_RELATION: tl.constexpr, BLOCK: tl.constexpr
):
    which = tl.program_id(0)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < n) & (column < n)
    at = row * n + column
    teacher, _ = _cosine(grams, 0, n, BLOCK)
    student, _ = _cosine(grams, 1, n, BLOCK)
    image, _ = _cosine(grams, 2, n, BLOCK)
    tokens, _ = _cosine(grams, 3, n, BLOCK)
    cosine, inverse_norm = _cosine(grams, which, n, BLOCK)
    grad_compressed = tl.load(grad_joint + 3 * n * n + at, mask=inside, other=0.0)
    grad_distilled = tl.load(grad_joint + 4 * n * n + at, mask=inside, other=0.0)
    own = tl.load(grad_joint + tl.minimum(which, 2) * n * n + at, mask=inside, other=0.0)
    grad_features = own + grad_compressed * teacher
    grad_teacher = own + grad_compressed * image * tokens
    if TRAINS_RELATION:
        grad_teacher += grad_distilled * student
    grad_cosine = grad_teacher
    grad_cosine = tl.where(which == 1, own + grad_distilled * teacher, grad_cosine)
    grad_cosine = tl.where(which == 2, grad_features * tokens, grad_cosine)
    grad_cosine = tl.where(which == 3, grad_features * image, grad_cosine) / n

    grad_log_cosine = grad_cosine * cosine
    sums = tl.sum(grad_log_cosine, axis=0) + tl.sum(grad_log_cosine, axis=1)
    grad_diagonal = sums * inverse_norm * inverse_norm / -2
    grad_gram = grad_cosine * inverse_norm[:, None] * inverse_norm[None, :]
    grad_gram += tl.where(row == column, grad_diagonal[:, None], 0.0)
    tl.store(grad_grams + which * n * n + at, grad_gram, mask=inside)


@triton.jit
def _jacobi_kernel(
    matrices,
    eigenvalues,
    eigenvectors,
    n,
    SWEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decompose by cyclic Jacobi rotations.

    One step rotates all pairs (i, i ^ k) at once, and a sweep takes the steps of all k.
    """
    i = tl.arange(0, BLOCK)
    row, column = i[:, None], i[None, :]
    matrix = tl.program_id(0).to(tl.int64)
    at = matrix * n * n + row * n + column
    inside = (row < n) & (column < n)
    a = tl.load(matrices + at, mask=inside, other=0.0)
    v = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    for _ in range(SWEEPS):
        for k in range(1, BLOCK):
            lower = i < (i ^ k)
            diagonal = tl.sum(tl.where(row == column, a, 0.0), axis=1)
            of_partner = tl.gather(diagonal, i ^ k, 0)
            coupling = tl.sum(tl.where(column == (row ^ k), a, 0.0), axis=1)
            # Rounding makes a[i, j] and a[j, i] differ, but both need the same rotation.
            coupling = (coupling + tl.gather(coupling, i ^ k, 0)) / 2
            apart = tl.where(lower, of_partner - diagonal, diagonal - of_partner)
            theta = apart / (2 * tl.where(coupling == 0, 1.0, coupling))
            tangent = 1 / (tl.abs(theta) + tl.sqrt(theta * theta + 1))
            tangent = tl.where(theta < 0, -tangent, tangent)
            tangent = tl.where(coupling == 0, 0.0, tangent)
            cosine = 1 / tl.sqrt(tangent * tangent + 1)
            sine = tl.where(lower, -tangent, tangent) * cosine
            row_partner = tl.broadcast_to(row ^ k, (BLOCK, BLOCK))
            column_partner = tl.broadcast_to(column ^ k, (BLOCK, BLOCK))
            a = cosine[:, None] * a + sine[:, None] * tl.gather(a, row_partner, 0)
            a = cosine[None, :] * a + sine[None, :] * tl.gather(a, column_partner, 1)
            v = cosine[None, :] * v + sine[None, :] * tl.gather(v, column_partner, 1)
    values = tl.sum(tl.where(row == column, a, 0.0), axis=1)
    tl.store(eigenvalues + matrix * n + i, values, mask=i < n)
    tl.store(eigenvectors + at, v, mask=inside)


def scores_by_kernel(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `scores.scores_by_blocks` does, in one launch."""
    batch, places, dim = pixels.shape
    tokens = query.shape[1]
    out, normalized = (query.new_empty(batch, tokens, places) for _ in range(2))
    mean, rstd = (query.new_empty(batch, places) for _ in range(2))
    query = query.contiguous()
    block_p, block_d = _tile(places, dim)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `scores.scores_backward_by_blocks` does, in one launch and two sums."""
    batch, places, dim = pixels.shape
    tokens = query.shape[1]
    block_p, block_d = _tile(places, dim)
    splits = min(_PIXEL_SPLITS, triton.cdiv(places, block_p))
    grad_pixels = torch.empty_like(pixels) if for_pixels else pixels.new_empty(0)
    partial_query = query.new_empty(batch, splits, tokens, dim)
    partial_residual = query.new_empty(batch, splits, tokens if for_residual else 0, dim)
    query = query.contiguous()
    _scores_backward_kernel[(splits, batch)](
        grad.contiguous(),
        pixels,
        query,
        query if residual is None else residual.contiguous(),
        normalized,
        mean,
        rstd,
        grad_pixels,
        partial_query,
        partial_residual,
        places,
        dim,
        *pixels.stride(),
        *(grad_pixels.stride() if for_pixels else (0, 0, 0)),
        N=tokens,
        RAW=residual is not None,
        FOR_PIXELS=for_pixels,
        FOR_RESIDUAL=for_residual,
        BLOCK_N=triton.next_power_of_2(tokens),
        BLOCK_P=block_p,
        BLOCK_D=block_d,
    )
    return grad_pixels, partial_query.sum(dim=1), partial_residual.sum(dim=1)


def batch_gram_by_kernel(rows: Tensor) -> Tensor:
    """Return the Gram matrix, float64, of the rows of a matrix, in one launch and one sum."""
    batch, features = rows.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    block_b, block_k = max(16, triton.next_power_of_2(batch)), 64
    splits = min(_FEATURE_SPLITS, triton.cdiv(features, block_k))
    partial = rows.new_empty(splits, batch, batch, dtype=torch.float64)
    _gram_kernel[(splits,)](
        rows, partial, batch, features, rows.stride(0), BLOCK_B=block_b, BLOCK_K=block_k
    )
    return partial.sum(dim=0)


def joint_by_kernel(grams: Tensor) -> Tensor:
    """Do what `joint.joint_by_operators` does, in one launch."""
    n = grams.shape[-1]
    joint_matrices = grams.new_empty(5, n, n)
    block = triton.next_power_of_2(n)
    _joint_kernel[(5,)](grams.contiguous(), joint_matrices, n, BLOCK=block, num_warps=_warps(block))
    return joint_matrices


def joint_backward_by_kernel(grad: Tensor, grams: Tensor, trains_relation: bool) -> Tensor:
    """Do what `joint.joint_backward_by_operators` does, in one launch."""
    n = grams.shape[-1]
    grad_grams = grams.new_empty(4, n, n)
    block = triton.next_power_of_2(n)
    _joint_backward_kernel[(4,)](
        grad.contiguous(),
        grams.contiguous(),
        grad_grams,
        n,
        TRAINS_RELATION=trains_relation,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return grad_grams


def eigh_by_kernel(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `eigenvalues.eigh` does, for float64 matrices, in one launch."""
    n = matrices.shape[-1]
    values = matrices.new_empty(matrices.shape[:-1])
    vectors = matrices.new_empty(matrices.shape)
    block = triton.next_power_of_2(n)
    _jacobi_kernel[(matrices[..., 0, 0].numel(),)](
        matrices.contiguous(),
        values,
        vectors,
        n,
        SWEEPS=_SWEEPS[block],
        BLOCK=block,
        num_warps=_warps(block),
    )
    return values, vectors


def _warps(block: int) -> int:
    return 1 if block <= 8 else 4 if block <= 32 else 8


def _tile(places: int, dim: int) -> tuple[int, int]:
    block_d = triton.next_power_of_2(dim)
    return min(max(1, _TILE // block_d), triton.next_power_of_2(places)), block_d


def _scores_fit(pixels: Tensor, query: Tensor) -> bool:
    tokens, dim = query.shape[1:]
    accumulator = triton.next_power_of_2(tokens) * triton.next_power_of_2(dim)
    fits = accumulator <= _TILE and tokens <= _MAX_TOKENS
    return fits and query.dtype == torch.float32


def _on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's device current, since Triton launches on the current one."""
    return torch.cuda.device(tensor.device)


@scores.scores_operator.register_kernel("cuda")
def _scores_on_cuda(
    pixels: Tensor, query: Tensor, residual: Tensor | None, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    route = scores_by_kernel if _scores_fit(pixels, query) else scores.scores_by_blocks
    with _on_device_of(pixels):
        return route(pixels, query, residual, offset, eps)


@scores.scores_backward_operator.register_kernel("cuda")
def _scores_backward_on_cuda(
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
    fits = _scores_fit(pixels, query)
    route = scores_backward_by_kernel if fits else scores.scores_backward_by_blocks
    with _on_device_of(pixels):
        return route(
            grad, pixels, query, residual, normalized, mean, rstd, for_pixels, for_residual
        )


@batch_gram.batch_gram_operator.register_kernel("cuda")
def _batch_gram_on_cuda(samples: Tensor) -> Tensor:
    if not batch_gram.sums_in_chunks(samples) or samples.shape[0] > _MAX_BATCH:
        return batch_gram.batch_gram_by_blocks(samples)
    with _on_device_of(samples):
        return batch_gram_by_kernel(batch_gram.in_memory_order(samples).flatten(1))


@joint.joint_operator.register_kernel("cuda")
def _joint_on_cuda(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    if grams.shape[-1] > _MAX_BATCH:
        return joint.joint_by_operators(grams, distillation_trains_relation)
    with _on_device_of(grams):
        return joint_by_kernel(grams)


@joint.joint_backward_operator.register_kernel("cuda")
def _joint_backward_on_cuda(
    grad: Tensor, grams: Tensor, distillation_trains_relation: bool
) -> Tensor:
    fits = grams.shape[-1] <= _MAX_BATCH
    route = joint_backward_by_kernel if fits else joint.joint_backward_by_operators
    with _on_device_of(grams):
        return route(grad, grams, distillation_trains_relation)


@eigenvalues.eigh.register_kernel("cuda")
def _eigh_on_cuda(matrices: Tensor) -> tuple[Tensor, Tensor]:
    # Triton before 3.3 has no gather.
    if matrices.shape[-1] > eigenvalues.SMALL or not hasattr(tl, "gather"):
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors.contiguous()
    with _on_device_of(matrices):
        return eigh_by_kernel(matrices)
