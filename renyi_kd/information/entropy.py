r"""Entropy, joint and conditional entropy, mutual information, total correlation (Def. 1-3).

Each functional is a sum of joint entropies with signs, and its last line spells out that sum. There
the variables are numbers: `x` and `y` are tuples of them, `x + y` is both, and the terms
`(+1, x), (+1, y), (-1, x + y)` are :math:`S(X) + S(Y) - S(X, Y)`.

The arithmetic is in float64, except for products of large float32 matrices at integer orders, and
for order 2 of RBF kernels of float32 samples: these are IEEE float32, with sums in float64. Neither
autocast nor `torch.set_float32_matmul_precision` touches it, forward or backward. Results have the
promoted dtype of the arguments, at least float32.
"""

from collections.abc import Sequence

from torch import Tensor

from renyi_kd._checks import (
    check_alpha,
    check_batch_dimensions,
    check_gram,
    check_same_device,
)
from renyi_kd._precision import compute_dtype, has_float64
from renyi_kd.information.kernels import Subset
from renyi_kd.information.routes.choice import Method, sum_of_entropies
from renyi_kd.information.routes.tiles import Progress, check_progress
from renyi_kd.information.samples import Gram, SampleGram


def renyi_entropy(
    gram: Gram,
    alpha: float = 2.0,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Matrix-based Rényi entropy of order alpha, in bits (InfoSAM, Def. 1, Eq. 1).

    .. math:: S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \operatorname{tr} A^\alpha,
        \qquad A = K / \operatorname{tr} K

    At :math:`\alpha = 1` it is the von Neumann entropy. At :math:`\alpha = \infty` it is the
    negated logarithm of the largest eigenvalue.

    Args:
        gram: positive semi-definite Gram matrix :math:`K`, shape `(..., n, n)`, or its samples as a
            `SampleGram`. Its scale does not matter. If the matrix is not symmetric,
            :math:`(K + K^\top) / 2` is taken.
        alpha: Rényi order > 0, `math.inf` included.
        method: `"frobenius"` (alpha 2), `"power"` (integer alpha up to 32, by the fewest matrix
            products) or `"eigvalsh"` (any alpha). Default: the first of these that can serve.
        progress: wraps the list of tiles, as `tqdm` does, where many samples are gone through tile
            by tile, in forward and in backward.

    Returns:
        Entropy in bits, between 0 and :math:`\log_2 n`, shape `(...)`, in the dtype of `gram`, at
        least float32.

    Raises:
        TypeError: `gram` is not a floating-point tensor, or `alpha` not a number.
        ValueError: `gram` is not square, `alpha` is not positive, or `method` is unknown or cannot
            serve `alpha`.

    Note:
        Positive semi-definiteness is not checked. A matrix that is not finite has an entropy and a
        gradient that are not finite. A zero matrix has entropy 0.

        At orders up to 1 the gradient on a singular matrix is unbounded. What is returned is the
        gradient on the range of the matrix. At orders below 1, eigenvalues up to `n * eps` times
        the largest count as zero.

        `"eigvalsh"` makes the host wait for a CUDA device, except up to n = 32 with Triton 3.3 or
        newer. It has no second derivative on repeated eigenvalues, and none at all on CUDA up to
        n = 32. `"frobenius"` and `"power"` do not wait. They have a second derivative, except at
        order 2 of a `SampleGram` of 512 samples or more whose kernel is neither linear nor RBF.

        From n = 128 on, `"frobenius"` multiplies the entries of float32 matrices in float32; so
        does `"power"` with matrices from n = 512 on, up to alpha 8. The rounding errors average out
        to some 1e-8 bits, and to a few 1e-6 bits if all entries are nearly equal.

        Where even the products cost too much, `renyi_entropy_estimate` estimates the entropy.

    References:
        L. G. Sánchez Giraldo, M. Rao, J. C. Príncipe, Measures of entropy from data using
        infinitely divisible kernels, 2015, https://arxiv.org/abs/1211.2459.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_entropy
        >>> renyi_entropy(torch.eye(4))
        tensor(2.)
        >>> renyi_entropy(torch.diag(torch.tensor([3.0, 1.0])), alpha=1)
        tensor(0.8113)
    """
    grams, (x,) = check_variables(gram=[gram])
    return sum_of_entropies_in_bits(grams, [(+1, x)], alpha, method, progress)


def renyi_joint_entropy(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Joint entropy of several variables over the same samples, in bits (Eq. 2 and 16).

    .. math:: S_\alpha(A_1, \dots, A_k) = S_\alpha\!\left(
        \frac{A_1 \circ \dots \circ A_k}{\operatorname{tr}(A_1 \circ \dots \circ A_k)}\right)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`; leading dimensions
            broadcast.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Joint entropy in bits, shape `(...)`, in the promoted dtype, at least float32.

    Raises:
        TypeError, ValueError: as `renyi_entropy`; also if no matrix is given, or if their sizes or
            devices differ.

    References:
        S. Yu et al., Multivariate extension of matrix-based Rényi's alpha-order entropy functional,
        2019, https://arxiv.org/abs/1808.07912.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_joint_entropy
        >>> renyi_joint_entropy(torch.ones(4, 4), torch.eye(4))
        tensor(2.)
    """
    variables, (all_of_them,) = check_variables(grams=grams)
    return sum_of_entropies_in_bits(variables, [(+1, all_of_them)], alpha, method, progress)


def renyi_conditional_entropy(
    gram: Gram,
    given: Gram,
    alpha: float = 2.0,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Conditional entropy :math:`S_\alpha(A | B) = S_\alpha(A, B) - S_\alpha(B)`, in bits.

    Args:
        gram: Gram matrix of the variable, shape `(..., n, n)`.
        given: Gram matrix of the condition, shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Conditional entropy in bits, shape `(...)`. It is not negative if both diagonals are
        constant, as `normalize_gram` makes them.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_conditional_entropy
        >>> renyi_conditional_entropy(torch.eye(4), torch.ones(4, 4))
        tensor(2.)
    """
    grams, (x, condition) = check_variables(gram=[gram], given=[given])
    terms = [(+1, x + condition), (-1, condition)]
    return sum_of_entropies_in_bits(grams, terms, alpha, method, progress)


def renyi_mutual_information(
    gram_x: Gram | Sequence[Gram],
    gram_y: Gram | Sequence[Gram],
    alpha: float = 2.0,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Mutual information of two groups of variables, in bits (Eq. 3, 17 and 18).

    .. math:: I_\alpha(A_1, \dots, A_k; B) =
        S_\alpha(A_1, \dots, A_k) + S_\alpha(B) - S_\alpha(A_1, \dots, A_k, B)

    Args:
        gram_x: a Gram matrix, or a sequence of them, each of shape `(..., n, n)`.
        gram_y: a Gram matrix, or a sequence of them, each of shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Mutual information in bits, shape `(...)`. It can be slightly negative, except at alpha 1
        with constant diagonals.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_mutual_information
        >>> labels = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> renyi_mutual_information(labels, labels)
        tensor(1.)
    """
    group_x = gram_x if isinstance(gram_x, Sequence) else [gram_x]
    group_y = gram_y if isinstance(gram_y, Sequence) else [gram_y]
    grams, (x, y) = check_variables(gram_x=group_x, gram_y=group_y)
    return sum_of_entropies_in_bits(grams, [(+1, x), (+1, y), (-1, x + y)], alpha, method, progress)


def renyi_total_correlation(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Total correlation of several variables, in bits.

    .. math:: T_\alpha(A_1, \dots, A_k) = \sum_i S_\alpha(A_i) - S_\alpha(A_1, \dots, A_k)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Total correlation in bits, shape `(...)`. For two variables it is their mutual information.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    References:
        S. Yu et al., Multivariate extension of matrix-based Rényi's alpha-order entropy functional,
        2019, https://arxiv.org/abs/1808.07912.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_total_correlation
        >>> renyi_total_correlation(torch.eye(4), torch.eye(4), torch.eye(4))
        tensor(4.)
    """
    variables, (all_of_them,) = check_variables(grams=grams)
    terms = [*((+1, (v,)) for v in all_of_them), (-1, all_of_them)]
    return sum_of_entropies_in_bits(variables, terms, alpha, method, progress)


def sum_of_entropies_in_bits(
    grams: Sequence[Gram],
    terms: Sequence[tuple[int, Subset]],
    alpha: float,
    method: Method | None,
    progress: Progress | None,
    *,
    exact: bool = False,
) -> Tensor:
    """Return the sum of joint entropies of subsets of `grams`, each times its sign.

    It is in the promoted dtype of `grams`; or, if it is to be computed with, an `exact` one is in
    float64, on the CPU where the device has none.
    """
    alpha = check_alpha(alpha)
    check_progress(progress)
    bits = sum_of_entropies(where_float64_is(grams), terms, alpha, method, progress)
    return bits if exact else as_result(bits, grams)


def where_float64_is(grams: Sequence[Gram]) -> Sequence[Gram]:
    """Return the Gram matrices on their device, or on the CPU if that has no float64."""
    return grams if has_float64(grams[0].device) else [gram.cpu() for gram in grams]


def as_result(value: Tensor, grams: Sequence[Gram]) -> Tensor:
    """Return the value in the promoted dtype of Gram matrices, on their device."""
    return value.to(compute_dtype(*grams)).to(grams[0].device)


def check_variables(**groups: Sequence[Gram]) -> tuple[list[Gram], list[Subset]]:
    """Return the Gram matrices of all groups in one list, and the numbers each group has in it.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: a group is empty, or the matrices do not fit each other.
    """
    for name, group in groups.items():
        if not group:
            raise ValueError(f"`{name}` must hold at least one Gram matrix, got none.")
    labels = {
        name if len(group) == 1 else f"{name}[{i}]": gram
        for name, group in groups.items()
        for i, gram in enumerate(group)
    }
    for label, gram in labels.items():
        if isinstance(gram, (int, float, str)):
            raise TypeError(
                f"`{label}` must be a Gram matrix, got {gram!r}. Options are given by name, as "
                f"alpha={gram!r}."
            )
        if isinstance(gram, (list, tuple)) and isinstance((*gram, None)[0], (Tensor, SampleGram)):
            raise TypeError(
                f"`{label}` must be a Gram matrix, got a {type(gram).__name__}. "
                f"Give several one by one, as in renyi_joint_entropy(*grams)."
            )
        if not isinstance(gram, SampleGram):
            check_gram(label, gram)
    grams = list(labels.values())
    if any(gram.shape[-1] != grams[0].shape[-1] for gram in grams):
        names = ", ".join(f"`{name}`" for name in groups)
        raise ValueError(
            f"All Gram matrices of {names} must be over the same n samples, "
            f"got shapes {[tuple(gram.shape) for gram in grams]}."
        )
    check_same_device(**labels)
    check_batch_dimensions(grams)
    subsets, end = [], 0
    for group in groups.values():
        start, end = end, end + len(group)
        subsets.append(tuple(range(start, end)))
    return grams, subsets
