"""Which route serves which entropies."""

from collections.abc import Sequence
from functools import reduce
from itertools import chain
from operator import add
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import compute_dtype, ieee_dtype
from renyi_kd.information.kernels import Subset, signed_sum, sum_over_joints_by_operators
from renyi_kd.information.routes.dual import (
    dual_error,
    dual_matrix,
    has_dual,
    order_2_entropy_of_dual,
)
from renyi_kd.information.routes.eigenvalues import SMALL, entropy_from_eigenvalues
from renyi_kd.information.routes.frobenius import entropies_of_samples, sum_of_entropies_of_matrices
from renyi_kd.information.routes.gaussian import are_rbf, sum_of_entropies_of_rbf
from renyi_kd.information.routes.joints import Entropy, sum_over_joints
from renyi_kd.information.routes.powers import (
    MAX_POWER,
    entropy_and_gradient_by_powers,
    entropy_by_powers,
)
from renyi_kd.information.routes.tiles import Progress
from renyi_kd.information.samples import Gram, SampleGram, as_matrix

Method: TypeAlias = Literal["frobenius", "power", "eigvalsh"]
# The sign of an entropy, and the numbers of the matrices it is of.
Term: TypeAlias = tuple[int, Subset]
_METHODS: tuple[str, ...] = get_args(Method)

# From this n on kernels of samples are gone through tile by tile at order 2, without a matrix, and
# powers of float32 matrices are multiplied in float32.
LARGE = 512

# From this n on order 2 of given matrices is faster tile by tile, with fewer copies of them.
_TILES = 128

# The largest order whose products may be float32. The largest eigenvalue of a matrix of trace one
# lies between 1 / n and one, and to this power it stays within the range.
_MAX_FLOAT32_POWER = 8


def choose_method(alpha: float, method: Method | None) -> Method:
    """Return `method` if it can serve this order; without one, the cheapest that can.

    Raises:
        ValueError: `method` is unknown, or cannot serve `alpha`.
    """
    has_power = 2 <= alpha <= MAX_POWER and alpha == int(alpha)
    if method is None:
        return "frobenius" if alpha == 2 else "power" if has_power else "eigvalsh"
    if method not in _METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(map(repr, _METHODS))}, got {method!r}. "
            f"For an estimate by Lanczos quadrature call renyi_entropy_estimate."
        )
    if method == "frobenius" and alpha != 2:
        raise ValueError(
            f"`method` 'frobenius' needs alpha = 2, got alpha = {alpha}. "
            f"Use 'eigvalsh', or None to choose."
        )
    if method == "power" and not has_power:
        raise ValueError(
            f"`method` 'power' needs an integer alpha from 2 to {MAX_POWER}, got alpha = {alpha}. "
            f"Use 'eigvalsh', or None to choose."
        )
    return method


def entry_error(gram: Gram) -> float:
    """Return the relative rounding error of the entries of a Gram matrix."""
    # Samples are taken as they are; the entries of a given matrix have been rounded.
    return torch.finfo(torch.float64 if isinstance(gram, SampleGram) else compute_dtype(gram)).eps


def trace_one_entropy(
    matrix: Tensor, alpha: float, method: Method | None = None, *, epsilon: float
) -> Tensor:
    """Return the Rényi entropy of matrices of trace one, in bits.

    Args:
        matrix: symmetric positive semi-definite, of trace one, shape `(..., n, n)`, float64, or
            float32 for powers.
        alpha: order > 0, 1 and infinity included.
        method: see `renyi_entropy`.
        epsilon: relative rounding error of the entries, see `entropy_from_eigenvalues`.

    Returns:
        Entropy in bits, float64, shape `(...)`.
    """
    if choose_method(alpha, method) == "eigvalsh":
        return entropy_from_eigenvalues(matrix, alpha, epsilon=epsilon)
    return entropy_by_powers(matrix, int(alpha))


def sum_of_entropies(
    grams: Sequence[Gram],
    terms: Sequence[Term],
    alpha: float,
    method: Method | None,
    progress: Progress | None,
) -> Tensor:
    """Return a sum of joint entropies, each by the first route that serves.

    Args:
        grams: `n x n` each; leading dimensions broadcast.
        terms: for each entropy its sign and the numbers of the matrices it is of.
        alpha: Rényi order.
        method: see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        The sum in bits, float64, shape `(...)`.
    """
    method = choose_method(alpha, method)
    parts, rest = [], []
    for sign, subset in terms:
        samples = [gram for gram in (grams[v] for v in subset) if isinstance(gram, SampleGram)]
        if len(samples) == len(subset) and has_dual(samples):
            parts.append(sign * _entropy_by_dual(samples, alpha, method))
        else:
            rest.append((sign, subset))
    if rest:
        # Kernels that the dual alone served are left out: their matrices may be too large to make.
        parts.append(_sum_without_dual(*_needed(grams, rest), alpha, method, progress))
    return reduce(add, parts)


def _needed(grams: Sequence[Any], terms: Sequence[Term]) -> tuple[list[Any], list[Term]]:
    """Return the matrices that the terms are of, and the terms with their numbers among these."""
    numbers = sorted({v for _, subset in terms for v in subset})
    renumbered = [(sign, tuple(numbers.index(v) for v in subset)) for sign, subset in terms]
    return [grams[v] for v in numbers], renumbered


def _entropy_by_dual(grams: Sequence[SampleGram], alpha: float, method: Method) -> Tensor:
    dual = dual_matrix(grams)
    if method == "frobenius":
        return order_2_entropy_of_dual(dual)
    return trace_one_entropy(dual, alpha, method, epsilon=dual_error(grams))


def _sum_without_dual(
    grams: Sequence[Gram],
    terms: Sequence[Term],
    alpha: float,
    method: Method,
    progress: Progress | None,
) -> Tensor:
    signs, subsets = zip(*terms, strict=True)
    tensors = (gram.tensors() if isinstance(gram, SampleGram) else [gram] for gram in grams)
    custom = not needs_plain_formulas(*chain.from_iterable(tensors))
    # torch.compile fuses the plain operators, which is as good. It must not even compare the size,
    # or it would compile again for the larger ones.
    custom = custom and not torch.compiler.is_compiling()
    samples = [gram for gram in grams if isinstance(gram, SampleGram)]
    if custom and method == "frobenius" and len(samples) == len(grams):
        if are_rbf(samples):
            return sum_of_entropies_of_rbf(samples, signs, subsets, progress)
        if grams[0].shape[-1] >= LARGE:
            return signed_sum(signs, entropies_of_samples(samples, subsets, progress))
    # Eigenvalues near zero are all noise in float32. Integer orders hardly see them.
    exact = method == "eigvalsh"
    matrices: Sequence[Tensor] = [as_matrix(gram, exact=exact) for gram in grams]
    if custom and method == "frobenius" and grams[0].shape[-1] >= _TILES:
        return sum_of_entropies_of_matrices(of_one_shape(matrices), signs, subsets)
    errors = [entry_error(gram) for gram in grams]
    of_subsets = [max(errors[v] for v in subset) for subset in subsets]
    dtype, parts = _dtype_of_joints(matrices, alpha, method) if custom else None, []
    for epsilon in dict.fromkeys(of_subsets):
        some = [term for term, own in zip(terms, of_subsets, strict=True) if own == epsilon]
        parts.append(_sum_over_joints(*_needed(matrices, some), alpha, method, epsilon, dtype))
    return reduce(add, parts)


def _sum_over_joints(
    matrices: Sequence[Tensor],
    terms: Sequence[Term],
    alpha: float,
    method: Method,
    epsilon: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the sum for one rounding error of the entries; without a `dtype`, by operators."""

    def value(joints: Tensor) -> Tensor:
        return trace_one_entropy(joints, alpha, method, epsilon=epsilon)

    def value_and_gradient(joints: Tensor) -> tuple[Tensor, Tensor]:
        if method != "eigvalsh":
            return entropy_and_gradient_by_powers(joints, int(alpha))
        with torch.enable_grad():
            joints = joints.detach().requires_grad_()
            if joints.is_cuda and joints.shape[-1] > SMALL:
                # CUDA decomposes a stack of such matrices more slowly than one after the other.
                bits = torch.stack([value(joint) for joint in joints.unbind()])
            else:
                bits = value(joints)
            (gradient,) = torch.autograd.grad(bits.sum(), joints)
        along = (gradient * joints.detach()).sum(dim=-1).sum(dim=-1)
        gradient.diagonal(dim1=-2, dim2=-1).sub_(along.unsqueeze(-1))
        return bits.detach(), gradient

    signs, subsets = zip(*terms, strict=True)
    if dtype is None:
        return sum_over_joints_by_operators(signs, subsets, value, *matrices)
    entropy = Entropy(value, value_and_gradient)
    return sum_over_joints(of_one_shape(matrices), signs, subsets, entropy, dtype)


def _dtype_of_joints(matrices: Sequence[Tensor], alpha: float, method: Method) -> torch.dtype:
    """Return the dtype of the products of powers, and float64 for eigenvalues."""
    n = matrices[0].shape[-1]
    # An entry of a product of matrices of trace one is one over n to this power, or less.
    in_range = n ** len(matrices) < 2.0**60
    if method != "power" or n < LARGE or alpha > _MAX_FLOAT32_POWER or not in_range:
        return torch.float64
    return ieee_dtype(compute_dtype(*matrices), matrices[0].device)


def of_one_shape(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return matrices whose leading dimensions are broadcast."""
    if all(matrix.shape == matrices[0].shape for matrix in matrices):
        return matrices
    same: Sequence[Tensor] = torch.broadcast_tensors(*matrices)  # type: ignore[no-untyped-call]
    return same
