r"""Measures made of inner products of Gram matrices, for comparison: HSIC and CKA.

Two linear kernels, given as `SampleGram`, need no n x n matrix: the inner product of
:math:`Z Z^\top` and :math:`Y Y^\top` is the squared norm of :math:`Z^\top Y`.
"""

from collections.abc import Callable, Sequence

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
    x, y, inner_product = _operands(grams, centred=True)
    return as_result(inner_product(x, y) / (n - 1) ** 2, grams)


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
    return as_result(cosine(grams, centred=True), grams)


def cosine(grams: Sequence[Gram], *, centred: bool) -> Tensor:
    """Return the cosine of the symmetric parts of two Gram matrices, or 0 if one is zero."""
    x, y, inner_product = _operands(grams, centred=centred)
    of_x, of_y = inner_product(x, x), inner_product(y, y)
    zero = (of_x == 0) | (of_y == 0)
    # The root of each, since the product of both leaves the range sooner.
    length_x, length_y = (torch.where(zero, 1.0, square).sqrt() for square in (of_x, of_y))
    return torch.where(zero, 0.0, inner_product(x, y) / length_x / length_y)


def _operands(
    grams: Sequence[Gram], *, centred: bool
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return two tensors in float64, and what makes the inner product of their Gram matrices.

    They are the samples of linear kernels of fewer dimensions than samples, else the matrices.
    """
    grams = where_float64_is(grams)
    samples = [
        gram.x.double() for gram in grams if isinstance(gram, SampleGram) and _is_narrow(gram)
    ]
    if len(samples) == len(grams):
        x, y = (_centred(z, -2) if centred else z for z in samples)
        return x, y, _inner_product_of_samples
    matrices = [as_matrix(gram).double() for gram in grams]
    symmetric = [(matrix + matrix.mT) / 2 for matrix in matrices]
    x, y = (_centred(_centred(k, -1), -2) if centred else k for k in symmetric)
    return x, y, _inner_product_of_matrices


def _is_narrow(gram: SampleGram) -> bool:
    return gram.kernel is linear_kernel and gram.x.shape[-1] <= gram.shape[-1]


def _inner_product_of_samples(x: Tensor, y: Tensor) -> Tensor:
    return (x.mT @ y).square().sum(dim=(-2, -1))


def _inner_product_of_matrices(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=(-2, -1))


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)
