"""Eigenvalues and eigenvectors of a stack of small matrices, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from renyi_kd._triton.launch import block_of, on_device_of, warps
from renyi_kd.information.routes import eigenvalues as operators

# The number of Jacobi sweeps after which matrices of a size are diagonal to rounding. Repeated
# eigenvalues need the most.
_SWEEPS = {1: 0, 2: 2, 4: 8, 8: 11, 16: 16, 32: 21}


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


def eigh_by_kernel(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `eigenvalues.eigh` does, for float64 matrices, in one launch."""
    n = matrices.shape[-1]
    values = matrices.new_empty(matrices.shape[:-1])
    vectors = matrices.new_empty(matrices.shape)
    block = block_of(n)
    _jacobi_kernel[(matrices[..., 0, 0].numel(),)](
        matrices.contiguous(),
        values,
        vectors,
        n,
        SWEEPS=_SWEEPS[block],
        BLOCK=block,
        num_warps=warps(block),
    )
    return values, vectors


@operators.eigh.register_kernel("cuda")
def _eigh_on_cuda(matrices: Tensor) -> tuple[Tensor, Tensor]:
    # Triton before 3.3 has no gather.
    if matrices.shape[-1] > operators.SMALL or not hasattr(tl, "gather"):
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors.contiguous()
    with on_device_of(matrices):
        return eigh_by_kernel(matrices)
