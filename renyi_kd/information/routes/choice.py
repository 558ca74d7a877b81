"""Which route serves which entropies."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import compute_dtype, ieee_dtype
from renyi_kd.information.kernels import Subset, joint_gram
from renyi_kd.information.routes.dual import (
    dual_error,
    dual_matrix,
    has_dual,
    order_2_entropy_of_dual,
)
from renyi_kd.information.routes.eigenvalues import entropy_from_eigenvalues
from renyi_kd.information.routes.frobenius import entropies_of_matrices, entropies_of_samples
from renyi_kd.information.routes.powers import MAX_POWER, entropy_by_powers, trace_of_power
from renyi_kd.information.routes.tiles import Progress
from renyi_kd.information.samples import Gram, SampleGram, as_matrix

Method: TypeAlias = Literal["frobenius", "power", "eigvalsh"]
_METHODS: tuple[str, ...] = get_args(Method)

# From this n on it is faster to go through a matrix tile by tile, without copies of it, and kernels
# of samples need no matrix.
LARGE = 512

# The largest order whose products may be float32. The largest eigenvalue of a scaled matrix lies
# between 1 / sqrt(n) and sqrt(n), and to this power it stays within the range.
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


def trace_one_entropy(
    matrix: Tensor, alpha: float, method: Method | None = None, *, epsilon: float
) -> Tensor:
    """Return the Rényi entropy of matrices of trace one, in bits.

    Args:
        matrix: symmetric positive semi-definite, of trace one, float64, shape `(..., n, n)`.
        alpha: order > 0, 1 and infinity included.
        method: see `renyi_entropy`.
        epsilon: relative rounding error of the entries, see `entropy_from_eigenvalues`.

    Returns:
        Entropy in bits, float64, shape `(...)`.
    """
    if choose_method(alpha, method) == "eigvalsh":
        return entropy_from_eigenvalues(matrix, alpha, epsilon=epsilon)
    return trace_of_power(matrix, int(alpha)).log2() / (1 - alpha)


def joint_entropies(
    grams: Sequence[Gram],
    subsets: Sequence[Subset],
    alpha: float,
    method: Method | None,
    progress: Progress | None,
) -> list[Tensor]:
    """Return joint entropies of subsets of Gram matrices, each by the first route that serves.

    Args:
        grams: `n x n` each; leading dimensions broadcast.
        subsets: for each entropy the numbers of the matrices it is of.
        alpha: Rényi order.
        method: see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Entropies in bits, float64, shape `(...)` each.
    """
    method = choose_method(alpha, method)
    found: dict[Subset, Tensor] = {}
    for subset in subsets:
        samples = [gram for gram in (grams[v] for v in subset) if isinstance(gram, SampleGram)]
        if len(samples) == len(subset) and has_dual(samples):
            found[subset] = _entropy_by_dual(samples, alpha, method)
    rest = [subset for subset in subsets if subset not in found]
    if rest:
        # Kernels that the dual alone served are left out: their matrices may be too large to make.
        needed = sorted({v for subset in rest for v in subset})
        renumbered = [tuple(needed.index(v) for v in subset) for subset in rest]
        entropies = _entropies_without_dual(
            [grams[v] for v in needed], renumbered, alpha, method, progress
        )
        found.update(zip(rest, entropies, strict=True))
    return [found[subset] for subset in subsets]


def _entropy_by_dual(grams: Sequence[SampleGram], alpha: float, method: Method) -> Tensor:
    dual = dual_matrix(grams)
    if method == "frobenius":
        return order_2_entropy_of_dual(dual)
    return trace_one_entropy(dual, alpha, method, epsilon=dual_error(grams))


def _entropies_without_dual(
    grams: Sequence[Gram],
    subsets: Sequence[Subset],
    alpha: float,
    method: Method,
    progress: Progress | None,
) -> Sequence[Tensor]:
    tensors = [gram.x if isinstance(gram, SampleGram) else gram for gram in grams]
    custom = not needs_plain_formulas(*tensors)
    samples = [gram for gram in grams if isinstance(gram, SampleGram)]
    by_tiles = custom and method == "frobenius" and len(samples) == len(grams)
    if by_tiles and grams[0].shape[-1] >= LARGE:
        return entropies_of_samples(samples, subsets, progress).unbind()
    matrices = [as_matrix(gram) for gram in grams]
    # torch.compile fuses the plain operators, which is as good as going by tiles. It must not even
    # compare the size, or it would compile again for the larger ones.
    large = custom and not torch.compiler.is_compiling() and grams[0].shape[-1] >= LARGE
    alike = all(matrix.shape == matrices[0].shape for matrix in matrices)
    if method == "frobenius" and large and alike:
        return entropies_of_matrices(matrices, subsets).unbind()
    errors = [
        # Samples are taken as they are; the entries of a given matrix have been rounded.
        torch.finfo(torch.float64 if isinstance(gram, SampleGram) else compute_dtype(gram)).eps
        for gram in grams
    ]
    entropies = []
    for subset in subsets:
        if method == "power" and large and len(subset) == 1:
            entropies.append(_entropy_of_large_matrix(matrices[subset[0]], int(alpha)))
        else:
            joint = joint_gram([matrices[v] for v in subset])
            epsilon = max(errors[v] for v in subset)
            entropies.append(trace_one_entropy(joint, alpha, method, epsilon=epsilon))
    return entropies


def _entropy_of_large_matrix(matrix: Tensor, alpha: int) -> Tensor:
    products = ieee_dtype(matrix.dtype, matrix.device)
    return entropy_by_powers(
        matrix, alpha, products if alpha <= _MAX_FLOAT32_POWER else torch.float64
    )
