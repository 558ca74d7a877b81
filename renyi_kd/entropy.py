"""Matrix-based Rényi entropy, joint and conditional entropy, mutual information (Def. 1-3).

All arithmetic is float64, which neither autocast nor `torch.set_float32_matmul_precision` touches,
forward or backward; results have the promoted dtype of the arguments, at least float32.
"""

from collections.abc import Sequence
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from renyi_kd._checks import (
    check_alpha,
    check_batch_dimensions,
    check_gram,
    check_same_device,
)
from renyi_kd._precision import compute_dtype
from renyi_kd.spectral import Method, choose_method, spectral_entropy


def renyi_entropy(gram: Tensor, alpha: float = 2.0, *, method: Method | None = None) -> Tensor:
    r"""Matrix-based Rényi entropy of order alpha, in bits (InfoSAM, Def. 1, Eq. 1).

    .. math:: S_\alpha(A) = \frac{1}{1-\alpha} \log_2 \operatorname{tr} A^\alpha,
        \qquad A = K / \operatorname{tr} K

    At :math:`\alpha = 1` it is the von Neumann entropy, at :math:`\alpha = \infty` the negated
    logarithm of the largest eigenvalue.

    Args:
        gram: positive semi-definite Gram matrix :math:`K`, shape `(..., n, n)`; its scale does not
            matter. Of a matrix that is not symmetric, :math:`(K + K^\top) / 2` is taken.
        alpha: Rényi order > 0, `math.inf` included.
        method: `"frobenius"` (alpha 2), `"power"` (integer alpha up to 32, with the fewest matrix
            products) or `"eigvalsh"` (any alpha). Default: the first of these that can serve.

    Returns:
        Entropy in bits, between 0 and :math:`\log_2 n`, shape `(...)`, in the dtype of `gram`, at
        least float32.

    Raises:
        TypeError: `gram` is not a floating-point tensor, or `alpha` not a number.
        ValueError: `gram` is not square, `alpha` is not positive, or `method` is unknown or cannot
            serve `alpha`.

    Note:
        Positive semi-definiteness is not checked. A non-finite matrix has a non-finite entropy and
        gradient; a zero matrix has entropy 0. At orders up to 1 the gradient on a singular matrix
        is unbounded, and that on the range of the matrix is taken; at orders below 1 eigenvalues
        up to `n * eps` times the largest count as zero. `"eigvalsh"` makes a CUDA device wait for
        the host, except up to n = 32 with Triton >= 3.3. It has no second derivative on repeated
        eigenvalues, on CUDA none up to n = 32. The other methods do not wait and have one.

    References:
        L. G. Sánchez Giraldo, M. Rao, J. C. Príncipe, Measures of entropy from data using
        infinitely divisible kernels, 2015, https://arxiv.org/abs/1211.2459.

    Example:
        >>> renyi_entropy(torch.eye(4))
        tensor(2.)
        >>> renyi_entropy(torch.diag(torch.tensor([3.0, 1.0])), alpha=1)
        tensor(0.8113)
    """
    return renyi_joint_entropy(gram, alpha=alpha, method=method)


def renyi_joint_entropy(*grams: Tensor, alpha: float = 2.0, method: Method | None = None) -> Tensor:
    r"""Joint entropy of several variables over the same samples, in bits (Eq. 2 and 16).

    .. math:: S_\alpha(A_1, \dots, A_k) = S_\alpha\!\left(
        \frac{A_1 \circ \dots \circ A_k}{\operatorname{tr}(A_1 \circ \dots \circ A_k)}\right)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`; leading dimensions
            broadcast.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.

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
    return _joint_entropy(grams, alpha, method).to(dtype)


def renyi_conditional_entropy(
    gram: Tensor, given: Tensor, alpha: float = 2.0, *, method: Method | None = None
) -> Tensor:
    r"""Conditional entropy :math:`S_\alpha(A | B) = S_\alpha(A, B) - S_\alpha(B)`, in bits.

    Args:
        gram: Gram matrix of the variable, shape `(..., n, n)`.
        given: Gram matrix of the condition, shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.

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
    joint = _joint_entropy([gram, given], alpha, method)
    return (joint - _joint_entropy([given], alpha, method)).to(dtype)


def renyi_mutual_information(
    gram_x: Tensor | Sequence[Tensor],
    gram_y: Tensor | Sequence[Tensor],
    alpha: float = 2.0,
    *,
    method: Method | None = None,
) -> Tensor:
    r"""Mutual information of two groups of variables, in bits (Eq. 3, 17 and 18).

    .. math:: I_\alpha(A_1, \dots, A_k; B) =
        S_\alpha(A_1, \dots, A_k) + S_\alpha(B) - S_\alpha(A_1, \dots, A_k, B)

    Args:
        gram_x: a Gram matrix, or a sequence of them, each of shape `(..., n, n)`.
        gram_y: likewise.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.

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
    marginals = _joint_entropy(group_x, alpha, method) + _joint_entropy(group_y, alpha, method)
    return (marginals - _joint_entropy(group_x + group_y, alpha, method)).to(dtype)


def renyi_total_correlation(
    *grams: Tensor, alpha: float = 2.0, method: Method | None = None
) -> Tensor:
    r"""Total correlation of several variables, in bits.

    .. math:: T_\alpha(A_1, \dots, A_k) = \sum_i S_\alpha(A_i) - S_\alpha(A_1, \dots, A_k)

    Args:
        grams: Gram matrices, one a variable, each of shape `(..., n, n)`.
        alpha: Rényi order, see `renyi_entropy`.
        method: route, see `renyi_entropy`.

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
    total = -_joint_entropy(grams, alpha, method)
    for gram in grams:
        total = total + _joint_entropy([gram], alpha, method)
    return total.to(dtype)


def _check_grams(**groups: Sequence[Tensor]) -> torch.dtype:
    for name, group in groups.items():
        if not group:
            raise ValueError(f"`{name}` must hold at least one Gram matrix, got none.")
        for gram in group:
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


def _joint_entropy(grams: Sequence[Tensor], alpha: float, method: Method | None) -> Tensor:
    """Joint entropy in bits, in float64: differences of entropies need all its digits."""
    alpha = check_alpha(alpha)
    method = choose_method(alpha, method)
    joint = _trace_one(grams[0])
    if len(grams) > 1:
        joint = _trace_one(reduce(mul, map(_trace_one, grams[1:]), joint))
    epsilon = torch.finfo(compute_dtype(*grams)).eps
    return spectral_entropy(joint, alpha, method, epsilon=epsilon)


def _trace_one(gram: Tensor) -> Tensor:
    """Symmetrised, of trace one, float64. A zero matrix becomes the limit of adding a constant."""
    gram = gram.double()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    zero = (gram == 0).all(dim=-1).all(dim=-1)[..., None, None]
    symmetric = (gram + gram.mT) / (2 * torch.where(zero, 1.0, trace))
    return torch.where(zero, 1 / gram.shape[-1], symmetric)
