r"""The Rényi entropy of a trace-one matrix from its spectrum (InfoSAM, Eq. 1 and 22).

.. math:: S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \operatorname{tr} A^\alpha

There is one function, `spectral_entropy`, and there are three routes to :math:`\operatorname{tr}
A^\alpha`: the Frobenius norm, matrix powers, and eigenvalues.
"""

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from renyi_kd._checks import check_choice
from renyi_kd.information.routes.powers import MAX_POWER, trace_of_power

Method: TypeAlias = Literal["frobenius", "power", "eigvalsh", "lanczos"]

# Up to it the eigenvalues of a stack can take one launch on CUDA, for which nothing waits.
SMALL = 32


def choose_method(alpha: float, method: Method | None) -> Method:
    """The route for this order: the named one if it can serve, else the cheapest that can.

    Raises:
        ValueError: an unknown `method`, or one that cannot serve `alpha`.
    """
    integer = 2 <= alpha <= MAX_POWER and alpha == int(alpha)
    if method is None:
        return "frobenius" if alpha == 2 else "power" if integer else "eigvalsh"
    check_choice("method", method, get_args(Method))
    if method == "frobenius" and alpha != 2:
        raise ValueError(
            f"`method` 'frobenius' needs alpha = 2, got alpha = {alpha}. "
            f"Use 'eigvalsh', or None to choose."
        )
    if method == "power" and not integer:
        raise ValueError(
            f"`method` 'power' needs an integer alpha from 2 to {MAX_POWER}, got alpha = {alpha}. "
            f"Use 'eigvalsh', or None to choose."
        )
    return method


def spectral_entropy(matrix: Tensor, alpha: float, method: Method, *, epsilon: float) -> Tensor:
    """Rényi entropy of order `alpha`, in bits.

    Args:
        matrix: symmetric positive semi-definite, of trace one, float64, shape `(..., n, n)`.
        alpha: order > 0, 1 and infinity included.
        method: the route, from `choose_method`.
        epsilon: relative rounding error of the entries of `matrix`: below order 1, eigenvalues up
            to `n * epsilon` times the largest count as zero.

    Returns:
        Entropy in bits, float64, shape `(...)`.
    """
    if method == "eigvalsh":
        return _entropy_from_eigenvalues(matrix, alpha, epsilon)
    return trace_of_power(matrix, int(alpha)).log2() / (1 - alpha)


def trace_one(gram: Tensor) -> Tensor:
    """Symmetrised, of trace one, float64. A zero matrix becomes the limit of adding a constant."""
    gram = gram.double()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    zero = (gram == 0).all(dim=-1).all(dim=-1)[..., None, None]
    symmetric = (gram + gram.mT) / (2 * torch.where(zero, 1.0, trace))
    return torch.where(zero, 1 / gram.shape[-1], symmetric)


def _entropy_from_eigenvalues(matrix: Tensor, alpha: float, epsilon: float) -> Tensor:
    # LAPACK and cuSOLVER raise on NaN: decompose a stand-in, and pass value and gradient on as NaN.
    finite = matrix.isfinite().all(dim=-1).all(dim=-1)
    poison = matrix.sum(dim=(-2, -1)) * torch.where(finite, 0.0, math.nan).to(matrix)
    stand_in = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    decomposable = torch.where(finite[..., None, None], matrix, stand_in)
    eigenvalues = _eigenvalues(decomposable)
    if alpha == math.inf:
        return poison - eigenvalues.amax(dim=-1).log2()

    p = eigenvalues.clamp(min=0)
    # Below order 1 the rounding errors of zero eigenvalues would count. From order 1 on they do
    # not, but small true eigenvalues do: only the solver's own rounding is off the range then, and
    # in the gradient alone.
    if alpha >= 1:
        epsilon = torch.finfo(matrix.dtype).eps
    in_range = p > matrix.shape[-1] * epsilon * p.amax(dim=-1, keepdim=True)
    if alpha <= 1:
        # Off the range the derivative is unbounded. Normalising the trace of the range alone, which
        # is one already, leaves the gradient of the entropy on the range.
        trace = torch.where(in_range, p, 0.0).sum(dim=-1, keepdim=True)
        p = p * (trace.detach() / trace)
    p = torch.where(in_range, p, p.detach() if alpha >= 1 else 0.0)
    if alpha == 1:
        nats: Tensor = torch.special.entr(p).sum(dim=-1)
        return poison + nats / math.log(2)

    log_p = torch.where(p > 0, p, 1.0).log()
    if abs(alpha - 1) < 0.5:
        # sum p^alpha = sum p + sum p (p^(alpha - 1) - 1) keeps its digits as alpha nears 1. The
        # first sum is one; only its derivative is left to add.
        excess = p * ((alpha - 1) * log_p).expm1() + (p - p.detach())
        log_trace = excess.sum(dim=-1).log1p()
    else:
        log_trace = torch.where(p > 0, alpha * log_p, -math.inf).logsumexp(dim=-1)
    return poison + log_trace / ((1 - alpha) * math.log(2))


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices, in any order."""
    if matrix.is_cuda and matrix.shape[-1] <= SMALL:
        eigenvalues: Tensor = eigh(matrix)[0]
    else:
        eigenvalues = torch.linalg.eigvalsh(matrix)
    return eigenvalues


@torch.library.custom_op("renyi_kd::eigh", mutates_args=())
def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, in any order, and eigenvectors, for backward; on CUDA nothing has to wait."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return eigenvalues, eigenvectors.contiguous()


@eigh.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:-1]), matrix.new_empty(matrix.shape)


@torch.library.custom_op("renyi_kd::eigh_backward", mutates_args=())
def _eigh_backward(grad: Tensor, eigenvectors: Tensor) -> Tensor:
    return (eigenvectors * grad.unsqueeze(-2)) @ eigenvectors.mT


@_eigh_backward.register_fake
def _(grad: Tensor, eigenvectors: Tensor) -> Tensor:
    return torch.empty_like(eigenvectors)


def _save_eigenvectors(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
    # Of eigenvalues alone, for which repeated ones are no trouble; the eigenvectors stay inside.
    grad_matrix: Tensor = _eigh_backward(grad, *ctx.saved_tensors)
    return grad_matrix


eigh.register_autograd(_backward, setup_context=_save_eigenvectors)
