"""Divergences between Gram matrices over the same samples, in bits."""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add, mul

import torch
from torch import Tensor

from renyi_kd._checks import check_alpha, check_real
from renyi_kd.information.alignment import cosine
from renyi_kd.information.entropy import as_result, check_variables, where_float64_is
from renyi_kd.information.kernels import trace_one
from renyi_kd.information.routes.choice import (
    Method,
    entry_error,
    of_one_shape,
    trace_one_entropy,
)
from renyi_kd.information.samples import Gram, as_matrix


def jensen_renyi_divergence(
    *grams: Gram,
    weights: Sequence[float] | None = None,
    alpha: float = 1.0,
    method: Method | None = None,
) -> Tensor:
    r"""Jensen-Rényi divergence of several Gram matrices, in bits.

    .. math:: S_\alpha\Bigl(\sum_i w_i A_i\Bigr) - \sum_i w_i S_\alpha(A_i), \qquad
        A_i = K_i / \operatorname{tr} K_i

    At :math:`\alpha = 1` it is the quantum Jensen-Shannon divergence. How much samples of several
    groups differ from each other is another quantity: `renyi_mutual_information` of the Gram matrix
    of all samples and the `label_kernel` of their groups.

    Args:
        grams: positive semi-definite matrices :math:`K_i`, at least two, of shape `(..., n, n)`:
            Gram matrices over the same n samples, or covariances of the same n features.
        weights: :math:`w_i` >= 0, one a matrix; they are divided by their sum. Default: equal ones.
        alpha: Rényi order, from above 0 up to 1.
        method: route, see `renyi_entropy`.

    Returns:
        Divergence in bits, shape `(...)`, from 0 to the entropy of the weights.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the matrices do not fit each other, or are not two or more, weights do not fit,
            or `alpha` is above 1. There the entropy is not concave, and what is called a divergence
            can be negative.

    References:
        A. B. Hamza, H. Krim, Jensen-Rényi divergence measure: theoretical and computational
        perspectives, 2003.

    Example:
        >>> import torch
        >>> from renyi_kd import jensen_renyi_divergence
        >>> first, second = torch.eye(2).diag_embed()
        >>> jensen_renyi_divergence(first, second)
        tensor(1.)
    """
    alpha = check_alpha(alpha)
    if alpha > 1:
        raise ValueError(
            f"`alpha` must be at most 1, got {alpha:g}: above it the entropy is not concave, and "
            f"the divergence can be negative. Use alpha=1, or cauchy_schwarz_divergence at order 2."
        )
    variables, _ = check_variables(grams=grams)
    if len(variables) < 2:
        raise ValueError("`grams` must hold at least two Gram matrices, got one.")
    shares = _shares(weights, len(variables))
    matrices = of_one_shape([trace_one(as_matrix(x)) for x in where_float64_is(variables)])
    mixture = reduce(add, map(mul, shares, matrices))
    entropies = trace_one_entropy(
        torch.stack([mixture, *matrices]), alpha, method, epsilon=max(map(entry_error, variables))
    )
    of_mixture, *of_each = entropies.unbind()
    return as_result(of_mixture - reduce(add, map(mul, shares, of_each)), grams)


def cauchy_schwarz_divergence(gram_x: Gram, gram_y: Gram) -> Tensor:
    r"""Cauchy-Schwarz divergence of two Gram matrices, in bits.

    .. math:: -\log_2 \frac{\langle A, B \rangle^2}{\lVert A \rVert_F^2 \, \lVert B \rVert_F^2}

    Two linear kernels, given as `SampleGram`, need no n x n matrix.

    Args:
        gram_x: positive semi-definite matrix :math:`A`, shape `(..., n, n)`, or its samples.
        gram_y: positive semi-definite matrix :math:`B`, shape `(..., n, n)`, or its samples.

    Returns:
        Divergence in bits, shape `(...)`, at least 0; infinite if the inner product is zero.
        Near there its gradient is without bound.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the matrices do not fit each other.

    References:
        R. Jenssen, J. C. Príncipe, D. Erdogmus, T. Eltoft, The Cauchy-Schwarz divergence and Parzen
        windowing: connections to graph theory and Mercer kernels, 2006.

    Example:
        >>> import torch
        >>> from renyi_kd import cauchy_schwarz_divergence
        >>> cauchy_schwarz_divergence(torch.eye(4), torch.ones(4, 4))
        tensor(2.)
    """
    grams, _ = check_variables(gram_x=[gram_x], gram_y=[gram_y])
    return as_result(-2 * cosine(grams, centred=False).log2(), grams)


def _shares(weights: Sequence[float] | None, number: int) -> list[float]:
    """Return the weights divided by their sum. Raise unless there is one for each matrix."""
    if weights is None:
        weights = [1.0] * number
    if not isinstance(weights, Sequence):
        raise TypeError(
            f"`weights` must be a sequence of numbers, got {type(weights).__name__}. "
            f"Give one number for each Gram matrix."
        )
    checked = [check_real(f"weights[{i}]", w, minimum=0) for i, w in enumerate(weights)]
    if len(checked) != number or not 0 < sum(checked) < math.inf:
        raise ValueError(
            f"`weights` must be {number} numbers >= 0, one for each Gram matrix, and not all zero, "
            f"got {weights}."
        )
    return [weight / sum(checked) for weight in checked]
