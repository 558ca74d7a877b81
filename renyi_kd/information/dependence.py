r"""More measures of dependence that are made of joint entropies.

As in `entropy`, the last line of each spells out its sum.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from renyi_kd._checks import check_choice
from renyi_kd._precision import compute_dtype
from renyi_kd.information.entropy import as_result, check_variables, sum_of_entropies_in_bits
from renyi_kd.information.routes.choice import Method
from renyi_kd.information.routes.tiles import Progress
from renyi_kd.information.samples import Gram

Normalizer = Literal["min", "max", "joint"]


def renyi_conditional_mutual_information(
    gram_x: Gram,
    gram_y: Gram,
    given: Gram,
    alpha: float = 2.0,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Mutual information of two variables given a third, in bits.

    .. math:: I_\alpha(A; B | C) = S_\alpha(A, C) + S_\alpha(B, C) - S_\alpha(C) - S_\alpha(A, B, C)

    Args:
        gram_x: Gram matrix of a variable, shape `(..., n, n)`.
        gram_y: Gram matrix of a variable, shape `(..., n, n)`.
        given: Gram matrix of the condition, shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Conditional mutual information in bits, shape `(...)`. It can be negative.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_conditional_mutual_information
        >>> nothing = torch.ones(4, 4)
        >>> renyi_conditional_mutual_information(torch.eye(4), torch.eye(4), given=nothing)
        tensor(2.)
        >>> renyi_conditional_mutual_information(torch.eye(4), torch.eye(4), given=torch.eye(4))
        tensor(0.)
    """
    grams, (x, y, z) = check_variables(gram_x=[gram_x], gram_y=[gram_y], given=[given])
    terms = [(+1, x + z), (+1, y + z), (-1, z), (-1, x + y + z)]
    return sum_of_entropies_in_bits(grams, terms, alpha, method, progress)


def renyi_normalized_mutual_information(
    gram_x: Gram,
    gram_y: Gram,
    alpha: float = 2.0,
    *,
    normalizer: Normalizer = "min",
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Mutual information of two variables as a share of an entropy, without a unit.

    .. math:: I_\alpha(A; B) \,/\, \min(S_\alpha(A), S_\alpha(B))

    Args:
        gram_x: Gram matrix, shape `(..., n, n)`.
        gram_y: Gram matrix, shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        normalizer: what it is divided by: the smaller (`"min"`) or the larger (`"max"`) of the two
            entropies, or that of the joint (`"joint"`).
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        The share, shape `(...)`, and 0 where the entropy is zero but for rounding (1e-12 bits in
        float64, 1e-5 bits in float32). With constant diagonals it is at most 1; it can be slightly
        negative.

    Raises:
        TypeError: as `renyi_joint_entropy`.
        ValueError: as `renyi_joint_entropy`; also if `normalizer` is unknown.

    References:
        S. Yu, F. Alesiani, X. Yu, R. Jenssen, J. C. Príncipe, Measuring dependence with
        matrix-based entropy functional, AAAI 2021, https://arxiv.org/abs/2101.10160. Of two
        variables, their normalised total correlation is that by `"min"` and their normalised dual
        total correlation that by `"joint"`.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_normalized_mutual_information
        >>> labels = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> renyi_normalized_mutual_information(torch.eye(4), labels)
        tensor(1.)
        >>> renyi_normalized_mutual_information(torch.eye(4), labels, normalizer="max")
        tensor(0.5000)
    """
    check_choice("normalizer", normalizer, get_args(Normalizer))
    grams, (x, y) = check_variables(gram_x=[gram_x], gram_y=[gram_y])
    of_x, of_y, of_both = (
        sum_of_entropies_in_bits(grams, [(+1, subset)], alpha, method, progress, exact=True)
        for subset in (x, y, x + y)
    )
    information = of_x + of_y - of_both
    divisors = {
        "min": torch.minimum(of_x, of_y),
        "max": torch.maximum(of_x, of_y),
        "joint": of_both,
    }
    divisor = divisors[normalizer]
    # The entropy of a constant variable is zero but for rounding.
    rounding = 1e-12 if compute_dtype(*grams) == torch.float64 else 1e-5
    zero = divisor.abs() < rounding
    share = torch.where(zero, 0.0, information / torch.where(zero, 1.0, divisor))
    return as_result(share, grams)


def renyi_dual_total_correlation(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Dual total correlation of several variables, in bits.

    .. math:: D_\alpha(A_1, \dots, A_k) = S_\alpha(A_1, \dots, A_k)
        - \sum_i S_\alpha(A_i | A_1, \dots, A_{i-1}, A_{i+1}, \dots, A_k)

    Args:
        grams: Gram matrices, one a variable, at least two, each of shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Dual total correlation in bits, shape `(...)`. For two variables it is their mutual
        information.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`; also if a single matrix is given.

    References:
        S. Yu, F. Alesiani, X. Yu, R. Jenssen, J. C. Príncipe, Measuring dependence with
        matrix-based entropy functional, AAAI 2021, https://arxiv.org/abs/2101.10160.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_dual_total_correlation
        >>> renyi_dual_total_correlation(torch.eye(4), torch.eye(4), torch.eye(4))
        tensor(2.)
    """
    variables, (all_of_them,) = check_variables(grams=grams)
    if len(variables) < 2:
        raise ValueError("`grams` must hold at least two Gram matrices, got one.")
    # S(i | rest) is S(all) - S(rest).
    rests = [tuple(u for u in all_of_them if u != v) for v in all_of_them]
    terms = [*((+1, rest) for rest in rests), (1 - len(variables), all_of_them)]
    return sum_of_entropies_in_bits(variables, terms, alpha, method, progress)
