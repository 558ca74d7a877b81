"""The joint Gram matrices of the loss and their gradient, in one launch each."""

import triton
import triton.language as tl
from torch import Tensor

from renyi_kd._triton.launch import block_of, on_device_of, warps
from renyi_kd.infosam.operators import joint as operators

# The largest batch whose matrices fit into a program's registers.
_MAX_BATCH = 64


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


def joint_by_kernel(grams: Tensor) -> Tensor:
    """Do what `joint.joint_by_operators` does, in one launch."""
    n = grams.shape[-1]
    joint_matrices = grams.new_empty(5, n, n)
    block = block_of(n)
    _joint_kernel[(5,)](grams.contiguous(), joint_matrices, n, BLOCK=block, num_warps=warps(block))
    return joint_matrices


def joint_backward_by_kernel(grad: Tensor, grams: Tensor, trains_relation: bool) -> Tensor:
    """Do what `joint.joint_backward_by_operators` does, in one launch."""
    n = grams.shape[-1]
    grad_grams = grams.new_empty(4, n, n)
    block = block_of(n)
    _joint_backward_kernel[(4,)](
        grad.contiguous(),
        grams.contiguous(),
        grad_grams,
        n,
        TRAINS_RELATION=trains_relation,
        BLOCK=block,
        num_warps=warps(block),
    )
    return grad_grams


@operators.joint_operator.register_kernel("cuda")
def _joint_on_cuda(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    if grams.shape[-1] > _MAX_BATCH:
        return operators.joint_by_operators(grams, distillation_trains_relation)
    with on_device_of(grams):
        return joint_by_kernel(grams)


@operators.joint_backward_operator.register_kernel("cuda")
def _joint_backward_on_cuda(
    grad: Tensor, grams: Tensor, distillation_trains_relation: bool
) -> Tensor:
    fits = grams.shape[-1] <= _MAX_BATCH
    route = joint_backward_by_kernel if fits else operators.joint_backward_by_operators
    with on_device_of(grams):
        return route(grad, grams, distillation_trains_relation)
