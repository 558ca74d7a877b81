"""Matrix-based Rényi entropy, joint and conditional entropy, mutual information (Def. 1-3).

The arithmetic is float64, but for products of large float32 matrices in `"power"` and `"lanczos"`,
which are IEEE float32. Neither autocast nor `torch.set_float32_matmul_precision` touches it,
forward or backward. Results have the promoted dtype of the arguments, at least float32.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add, mul
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from renyi_kd._checks import (
    check_alpha,
    check_batch_dimensions,
    check_gram,
    check_same_device,
)
from renyi_kd._precision import compute_dtype
from renyi_kd.information.routes.choice import entropies_in_bits
from renyi_kd.information.routes.eigenvalues import Method
from renyi_kd.information.routes.frobenius import Subset
from renyi_kd.information.routes.quadrature import Lanczos
from renyi_kd.information.routes.tiles import Progress
from renyi_kd.information.samples import SampleGram

Gram: TypeAlias = Tensor | SampleGram


@overload
def renyi_entropy(
    gram: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...
@overload
def renyi_entropy(
    gram: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def renyi_entropy(
    gram: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Matrix-based Rényi entropy of order alpha, in bits (InfoSAM, Def. 1, Eq. 1).

    .. math:: S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \operatorname{tr} A^\alpha,
        \qquad A = K / \operatorname{tr} K

    At :math:`\alpha = 1` it is the von Neumann entropy, at :math:`\alpha = \infty` the negated
    logarithm of the largest eigenvalue.

    Args:
        gram: positive semi-definite Gram matrix :math:`K`, shape `(..., n, n)`, or its samples as a
            `SampleGram`; its scale does not matter. Of a matrix that is not symmetric,
            :math:`(K + K^\top) / 2` is taken, except by `"lanczos"`, which needs a symmetric one.
        alpha: Rényi order > 0, `math.inf` included.
        method: `"frobenius"` (alpha 2), `"power"` (integer alpha up to 32, with the fewest matrix
            products) or `"eigvalsh"` (any alpha). Default: the first of these that can serve.
            `"lanczos"`, or a `Lanczos` with its options, is an estimate for alpha from 1.5 on.
        progress: what to wrap the list of tiles in, such as `tqdm`, where many samples are gone
            through tile by tile, forward and backward.
        return_error: whether to return the standard error of an estimate too.

    Returns:
        Entropy in bits, between 0 and :math:`\log_2 n`, shape `(...)`, in the dtype of `gram`, at
        least float32. With `return_error` a pair of it and its standard error, which passes no
        gradient.

    Raises:
        TypeError: `gram` is not a floating-point tensor, or `alpha` not a number.
        ValueError: `gram` is not square, `alpha` is not positive, `method` is unknown or cannot
            serve `alpha` or `n`, or `return_error` is asked of an exact method.

    Note:
        Positive semi-definiteness is not checked. A non-finite matrix has a non-finite entropy and
        gradient; a zero matrix has entropy 0. At orders up to 1 the gradient on a singular matrix
        is unbounded, and that on the range of the matrix is taken; at orders below 1 eigenvalues
        up to `n * eps` times the largest count as zero. `"eigvalsh"` makes a CUDA device wait for
        the host, except up to n = 32 with Triton >= 3.3. It has no second derivative on repeated
        eigenvalues, on CUDA none up to n = 32. `"frobenius"` and `"power"` do not wait and have
        one, except of a `SampleGram` of 512 samples or more.

        From n = 512 on `"power"` multiplies float32 matrices in float32 up to alpha 8. Its rounding
        errors average out to some 1e-9 bits, and to 1e-6 of nearly equal entries.

        The gradient of an estimate is an estimate too, and biased: where the spectrum decays fast
        it is good to a per cent or better; on slow decays it is 10 to 40 per cent of its norm off,
        at alpha 6 up to 70. A larger `rank` helps.

    References:
        L. G. Sánchez Giraldo, M. Rao, J. C. Príncipe, Measures of entropy from data using
        infinitely divisible kernels, 2015, https://arxiv.org/abs/1211.2459.

    Example:
        >>> renyi_entropy(torch.eye(4))
        tensor(2.)
        >>> renyi_entropy(torch.diag(torch.tensor([3.0, 1.0])), alpha=1)
        tensor(0.8113)
    """
    dtype = _check_grams(gram=[gram])
    return _combine(dtype, [gram], {(0,): 1}, alpha, method, progress, return_error)


@overload
def renyi_joint_entropy(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...
@overload
def renyi_joint_entropy(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def renyi_joint_entropy(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Joint entropy of several variables over the same samples, in bits (Eq. 2 and 16).

    .. math:: S_\alpha(A_1, \dots, A_k) = S_\alpha\!\left(
        \frac{A_1 \circ \dots \circ A_k}{\operatorname{tr}(A_1 \circ \dots \circ A_k)}\right)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`; leading dimensions
            broadcast.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.
        return_error: see `renyi_entropy`.

    Returns:
        Joint entropy in bits, shape `(...)`, in the promoted dtype, at least float32.

    Raises:
        TypeError, ValueError: as `renyi_entropy`; also if no matrix is given, or sizes or devices
            differ.

    References:
        S. Yu et al., Multivariate extension of matrix-based Rényi's alpha-order entropy functional,
        2019, https://arxiv.org/abs/1808.07912.

    Example:
        >>> renyi_joint_entropy(torch.ones(4, 4), torch.eye(4))
        tensor(2.)
    """
    dtype = _check_grams(grams=grams)
    everything = tuple(range(len(grams)))
    return _combine(dtype, grams, {everything: 1}, alpha, method, progress, return_error)


@overload
def renyi_conditional_entropy(
    gram: Gram,
    given: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...
@overload
def renyi_conditional_entropy(
    gram: Gram,
    given: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def renyi_conditional_entropy(
    gram: Gram,
    given: Gram,
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Conditional entropy :math:`S_\alpha(A | B) = S_\alpha(A, B) - S_\alpha(B)`, in bits.

    Args:
        gram: Gram matrix of the variable, shape `(..., n, n)`.
        given: Gram matrix of the condition, shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.
        return_error: see `renyi_entropy`.

    Returns:
        Conditional entropy in bits, shape `(...)`. It is not negative if both diagonals are
        constant, as `normalize_gram` makes them.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    Example:
        >>> renyi_conditional_entropy(torch.eye(4), torch.ones(4, 4))
        tensor(2.)
    """
    dtype = _check_grams(gram=[gram], given=[given])
    terms = {(0, 1): 1, (1,): -1}
    return _combine(dtype, [gram, given], terms, alpha, method, progress, return_error)


@overload
def renyi_mutual_information(
    gram_x: Gram | Sequence[Gram],
    gram_y: Gram | Sequence[Gram],
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...
@overload
def renyi_mutual_information(
    gram_x: Gram | Sequence[Gram],
    gram_y: Gram | Sequence[Gram],
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def renyi_mutual_information(
    gram_x: Gram | Sequence[Gram],
    gram_y: Gram | Sequence[Gram],
    alpha: float = 2.0,
    *,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mutual information of two groups of variables, in bits (Eq. 3, 17 and 18).

    .. math:: I_\alpha(A_1, \dots, A_k; B) =
        S_\alpha(A_1, \dots, A_k) + S_\alpha(B) - S_\alpha(A_1, \dots, A_k, B)

    Args:
        gram_x: a Gram matrix, or a sequence of them, each of shape `(..., n, n)`.
        gram_y: likewise.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.
        return_error: see `renyi_entropy`.

    Returns:
        Mutual information in bits, shape `(...)`. Except at alpha 1 with constant diagonals it can
        be slightly negative.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    Example:
        >>> labels = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> renyi_mutual_information(labels, labels)
        tensor(1.)
    """
    group_x = list(gram_x) if isinstance(gram_x, Sequence) else [gram_x]
    group_y = list(gram_y) if isinstance(gram_y, Sequence) else [gram_y]
    dtype = _check_grams(gram_x=group_x, gram_y=group_y)
    grams = [*group_x, *group_y]
    everything = tuple(range(len(grams)))
    terms = {everything[: len(group_x)]: 1, everything[len(group_x) :]: 1, everything: -1}
    return _combine(dtype, grams, terms, alpha, method, progress, return_error)


@overload
def renyi_total_correlation(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[False] = False,
) -> Tensor: ...
@overload
def renyi_total_correlation(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def renyi_total_correlation(
    *grams: Gram,
    alpha: float = 2.0,
    method: Method | Lanczos | None = None,
    progress: Progress | None = None,
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Total correlation of several variables, in bits.

    .. math:: T_\alpha(A_1, \dots, A_k) = \sum_i S_\alpha(A_i) - S_\alpha(A_1, \dots, A_k)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.
        progress: see `renyi_entropy`.
        return_error: see `renyi_entropy`.

    Returns:
        Total correlation in bits, shape `(...)`; for two variables their mutual information.

    Raises:
        TypeError, ValueError: as `renyi_joint_entropy`.

    References:
        S. Yu et al., Multivariate extension of matrix-based Rényi's alpha-order entropy functional,
        2019, https://arxiv.org/abs/1808.07912.

    Example:
        >>> renyi_total_correlation(torch.eye(4), torch.eye(4), torch.eye(4))
        tensor(4.)
    """
    dtype = _check_grams(grams=grams)
    terms: dict[Subset, int] = {(v,): 1 for v in range(len(grams))}
    everything = tuple(range(len(grams)))
    terms[everything] = terms.get(everything, 0) - 1
    return _combine(dtype, grams, terms, alpha, method, progress, return_error)


def _check_grams(**groups: Sequence[Gram]) -> torch.dtype:
    for name, group in groups.items():
        if not group:
            raise ValueError(f"`{name}` must hold at least one Gram matrix, got none.")
        for gram in group:
            if not isinstance(gram, SampleGram):
                check_gram(name, gram)
    grams = [gram for group in groups.values() for gram in group]
    names = ", ".join(f"`{name}`" for name in groups)
    if len({gram.shape[-1] for gram in grams}) > 1:
        raise ValueError(
            f"All Gram matrices of {names} must be over the same n samples, "
            f"got shapes {[tuple(gram.shape) for gram in grams]}."
        )
    check_same_device(
        **{f"{name}[{i}]": gram for name, group in groups.items() for i, gram in enumerate(group)}
    )
    check_batch_dimensions(grams)
    return compute_dtype(*grams)


def _combine(
    dtype: torch.dtype,
    grams: Sequence[Gram],
    terms: dict[Subset, int],
    alpha: float,
    method: Method | Lanczos | None,
    progress: Progress | None,
    return_error: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of the joint entropies of subsets of `grams`, each times its sign."""
    alpha = check_alpha(alpha)
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be callable, such as tqdm.tqdm, got {type(progress).__name__}."
        )
    if return_error and not (method == "lanczos" or isinstance(method, Lanczos)):
        raise ValueError(
            f"`return_error` needs `method` 'lanczos', got {method!r}: other methods are exact."
        )
    entropies, errors = entropies_in_bits(grams, list(terms), alpha, method, progress)
    # In float64: differences of entropies need all their digits.
    signs = list(terms.values())
    bits: Tensor = reduce(add, map(mul, signs, entropies)).to(dtype)
    if errors is None:
        return bits
    # The estimates are independent of each other.
    error = reduce(add, [(s * e).square() for s, e in zip(signs, errors, strict=True)]).sqrt()
    return (bits, error.to(dtype)) if return_error else bits
