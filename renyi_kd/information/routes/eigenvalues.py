r"""Any order by eigenvalues (InfoSAM, Eq. 1).

.. math:: S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \sum_i \lambda_i(A)^\alpha
"""

import math
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas

# Up to this n one CUDA kernel decomposes a whole stack of matrices, and the host does not wait.
SMALL = 32


def entropy_from_eigenvalues(matrix: Tensor, alpha: float, *, epsilon: float) -> Tensor:
    """Return the Rényi entropy of order `alpha`, in bits.

    Args:
        matrix: symmetric positive semi-definite, of trace one, float64, shape `(..., n, n)`.
        alpha: order > 0, 1 and infinity included.
        epsilon: relative rounding error of the entries of `matrix`. Below order 1, eigenvalues up
            to `n * epsilon` times the largest count as zero.

    Returns:
        Entropy in bits, float64, shape `(...)`.
    """
    # LAPACK and cuSOLVER raise an error on NaN. So a matrix that is not finite is replaced by the
    # identity, and NaN is added to its entropy, through which the gradient becomes NaN too.
    finite = matrix.isfinite().all(dim=-1).all(dim=-1)
    zero_or_nan = matrix.sum(dim=(-2, -1)) * torch.where(finite, 0.0, math.nan).to(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    eigenvalues = _eigenvalues(torch.where(finite[..., None, None], matrix, identity))
    if alpha == math.inf:
        return zero_or_nan - eigenvalues.amax(dim=-1).log2()

    p, in_range = _probabilities(eigenvalues, alpha, epsilon)
    log_p = torch.where(p > 0, p, 1.0).log()
    if alpha == 1:
        # Not by torch.special.entr, whose derivative in forward mode is NaN at zero.
        return zero_or_nan - (p * log_p).sum(dim=-1) / math.log(2)

    if abs(alpha - 1) < 0.5:
        # The sum of p^alpha is the sum of p, which is one, and of p (p^(alpha - 1) - 1). Written
        # so, it keeps its digits as alpha nears 1. So does its gradient, since that of the first
        # sum is left out: the matrix has the trace one whatever it is made of. Off the range,
        # where the whole slope is zero, that of the second sum is -1.
        excess = p * ((alpha - 1) * log_p).expm1()
        if alpha > 1:
            excess = excess + torch.where(in_range, 0.0, eigenvalues.detach() - eigenvalues)
        log_trace = excess.sum(dim=-1).log1p()
    else:
        log_trace = torch.where(p > 0, alpha * log_p, -math.inf).logsumexp(dim=-1)
    return zero_or_nan + log_trace / ((1 - alpha) * math.log(2))


def _probabilities(eigenvalues: Tensor, alpha: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues as probabilities, and which are on the range; only those learn.

    The range is spanned by the eigenvectors whose eigenvalue is not zero but for rounding. Off it
    the derivative is unbounded at orders up to 1, and noise at higher orders.
    """
    p = eigenvalues.clamp(min=0)
    # Below order 1 the rounding errors of zero eigenvalues would count as information, so the whole
    # error of the entries decides what is zero. From order 1 on they add up to nothing, but small
    # eigenvalues do count. So only the solver's own rounding is off the range, and only its
    # gradient is cut, not the value.
    if alpha >= 1:
        epsilon = torch.finfo(p.dtype).eps
    in_range = p > p.shape[-1] * epsilon * p.amax(dim=-1, keepdim=True)
    if alpha <= 1:
        # What counts is the matrix restricted to its range, which has the trace one, too.
        p = p / torch.where(in_range, p, 0.0).sum(dim=-1, keepdim=True)
    return torch.where(in_range, p, p.detach() if alpha >= 1 else 0.0), in_range


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices, in any order."""
    if matrix.is_cuda and matrix.shape[-1] <= SMALL and not needs_plain_formulas(matrix):
        eigenvalues: Tensor = eigh(matrix)[0]
    else:
        eigenvalues = torch.linalg.eigvalsh(matrix)
    return eigenvalues


@torch.library.custom_op("renyi_kd::eigh", mutates_args=())
def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, in any order, and the eigenvectors, which backward needs."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return eigenvalues, eigenvectors.contiguous()


@eigh.register_fake
def _eigh_shapes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:-1]), matrix.new_empty(matrix.shape)


@torch.library.custom_op("renyi_kd::eigh_backward", mutates_args=())
def _eigh_backward(grad_eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    return (eigenvectors * grad_eigenvalues.unsqueeze(-2)) @ eigenvectors.mT


@_eigh_backward.register_fake
def _eigh_backward_shapes(grad_eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    return torch.empty_like(eigenvectors)


def _save_eigenvectors(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _gradient_of_eigenvalues(ctx: Any, grad_eigenvalues: Tensor, _: Tensor) -> Tensor:
    # The eigenvectors are for this gradient alone and never leave the library. So their own
    # gradient, which repeated eigenvalues make infinite, is not needed.
    grad_matrix: Tensor = _eigh_backward(grad_eigenvalues, *ctx.saved_tensors)
    return grad_matrix


eigh.register_autograd(_gradient_of_eigenvalues, setup_context=_save_eigenvectors)
