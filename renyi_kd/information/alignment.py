r"""Measures made of inner products of Gram matrices, for comparison: HSIC and CKA.

Two linear kernels, given as `SampleGram`, need no n x n matrix: the inner product of
:math:`Z Z^\top` and :math:`Y Y^\top` is the squared norm of :math:`Z^\top Y`.
"""

import torch
from torch import Tensor

from renyi_kd.information.entropy import as_result, check_variables, where_float64_is
from renyi_kd.information.kernels import linear_kernel
from renyi_kd.information.samples import Gram, SampleGram, as_matrix


def hsic(gram_x: Gram, gram_y: Gram) -> Tensor:
    r"""Hilbert-Schmidt independence criterion, the biased estimate.

    .. math:: \operatorname{tr}(K H L H) / (n - 1)^2, \qquad H = I - 1 1^\top / n

    Args:
        gram_x: Gram matrix :math:`K`, shape `(..., n, n)`, or its samples as a `SampleGram`.
        gram_y: Gram matrix :math:`L`, shape `(..., n, n)`.

    Returns:
        The criterion, shape `(...)`, in the promoted dtype, at least float32. It has no unit, and
        the scale of both matrices.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the matrices do not fit each other, or are of a single sample.

    References:
        A. Gretton, O. Bousquet, A. Smola, B. Schölkopf, Measuring statistical dependence with
        Hilbert-Schmidt norms, 2005.

    Example:
        >>> import torch
        >>> from renyi_kd import hsic
        >>> hsic(torch.eye(4), torch.eye(4))
        tensor(0.3333)
    """
    grams, _ = check_variables(gram_x=[gram_x], gram_y=[gram_y])
    n = gram_x.shape[-1]
    if n < 2:
        raise ValueError("`gram_x` must be of at least two samples, got one.")
    x, y = where_float64_is(grams)
    return as_result(inner_product(x, y, centred=True) / (n - 1) ** 2, grams)


def cka(gram_x: Gram, gram_y: Gram) -> Tensor:
    r"""Centred kernel alignment, the cosine of two centred Gram matrices.

    .. math:: \frac{\langle H K H, H L H \rangle}{\lVert H K H \rVert_F \, \lVert H L H \rVert_F}

    Args:
        gram_x: Gram matrix :math:`K`, shape `(..., n, n)`, or its samples as a `SampleGram`.
        gram_y: Gram matrix :math:`L`, shape `(..., n, n)`.

    Returns:
        The alignment, from 0 to 1, shape `(...)`, in the promoted dtype, at least float32. It is 0
        if all samples of a variable are equal.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the matrices do not fit each other.

    References:
        S. Kornblith, M. Norouzi, H. Lee, G. Hinton, Similarity of neural network representations
        revisited, ICML 2019.

    Example:
        >>> import torch
        >>> from renyi_kd import cka
        >>> cka(torch.eye(4), 2 * torch.eye(4))
        tensor(1.)
    """
    grams, _ = check_variables(gram_x=[gram_x], gram_y=[gram_y])
    return as_result(cosine(*where_float64_is(grams), centred=True), grams)


def inner_product(x: Gram, y: Gram, *, centred: bool) -> Tensor:
    """Return the inner product of the symmetric parts of two Gram matrices, in float64."""
    if isinstance(x, SampleGram) and isinstance(y, SampleGram):
        linear = x.kernel is linear_kernel and y.kernel is linear_kernel
        if linear and x.x.shape[-1] * y.x.shape[-1] <= x.shape[-1] ** 2:
            a, b = (
                _centred(gram.x.double(), -2) if centred else gram.x.double() for gram in (x, y)
            )
            return (a.mT @ b).square().sum(dim=(-2, -1))
    a, b = (as_matrix(gram).double() for gram in (x, y))
    a = (a + a.mT) / 2
    if centred:
        a, b = (_centred(_centred(matrix, -1), -2) for matrix in (a, b))
    return (a * b).sum(dim=(-2, -1))


def cosine(x: Gram, y: Gram, *, centred: bool) -> Tensor:
    """Return the cosine of the symmetric parts of two Gram matrices, or 0 if one is zero."""
    product = inner_product(x, y, centred=centred)
    of_x, of_y = (inner_product(gram, gram, centred=centred) for gram in (x, y))
    zero = (of_x == 0) | (of_y == 0)
    # The root of each, since the product of both leaves the range sooner.
    lengths = [torch.where(zero, 1.0, square).sqrt() for square in (of_x, of_y)]
    return torch.where(zero, 0.0, product / lengths[0] / lengths[1])


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)
