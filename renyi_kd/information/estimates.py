"""Entropies of many samples by estimate, with their standard error."""

from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._checks import check_alpha
from renyi_kd._precision import compute_dtype
from renyi_kd.information.entropy import as_result, check_variables, where_float64_is
from renyi_kd.information.kernels import joint_gram
from renyi_kd.information.routes.lanczos import estimate_of_matrix, estimate_of_samples
from renyi_kd.information.routes.quadrature import choose_vectors
from renyi_kd.information.routes.tiles import Progress, check_progress
from renyi_kd.information.samples import Gram, SampleGram, as_matrix


class Estimate(NamedTuple):
    """An entropy by estimate, and how far off it may be."""

    bits: Tensor
    """The estimate in bits, shape `(...)`. It passes a gradient."""
    error: Tensor
    """Its standard error in bits, shape `(...)`, without a gradient."""


def renyi_entropy_estimate(
    *grams: Gram,
    alpha: float = 2.0,
    rank: int | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Estimate:
    r"""Estimate the joint entropy of order alpha >= 1.5 of one or more variables, in bits.

    It takes products of the joint Gram matrix with `rank + probes` vectors, in place of its
    eigenvalues. Of kernels of samples (`SampleGram`) no matrix is made.

    Args:
        grams: Gram matrices, one a variable, each symmetric and of shape `(..., n, n)`; leading
            dimensions broadcast. If some are `SampleGram` and others are matrices, the matrices of
            all are made.
        alpha: Rényi order, finite and at least 1.5.
        rank: number of vectors that find the large eigenvalues. Default: 16, and 64 below alpha 2.
        probes: number of random vectors, at least 2, that stand for the other eigenvalues. Default:
            8, and 32 below alpha 2.
        generator: draws the vectors, on the device of the matrices. Default: that of PyTorch. Do
            not seed it as the data were: vectors drawn like the samples are not independent of
            them.
        progress: see `renyi_entropy`.

    Returns:
        `Estimate` of entropy and standard error, in the promoted dtype, at least float32.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the matrices do not fit, `alpha` is below 1.5 or infinite, or n is not larger
            than `rank + probes`.

    Note:
        Over spectra from flat ones to a single large eigenvalue, at least 95 % of 200 estimates
        were within three standard errors. The error does not see the rounding of the matrix itself.

        The gradient is an estimate too, and it is biased. Where the spectrum decays fast it is good
        to a per cent or better. On slow decays it is off by 10 to 40 per cent of its norm, at alpha
        6 by up to 70. A larger `rank` helps. It has no second derivative.

        Estimates are independent of each other. So the error of a sum of them, such as the mutual
        information of the second example, is the root of the sum of their squared errors.

    References:
        T. Gong, Y. Dong, S. Yu, B. Dong, Computationally efficient approximations for matrix-based
        Rényi's entropy, 2022, https://arxiv.org/abs/2112.13720. The sources of the algorithm are
        named in `routes/quadrature.py`.

    Example:
        >>> import torch
        >>> from renyi_kd import renyi_entropy_estimate
        >>> generator = torch.Generator().manual_seed(0)
        >>> gram = torch.ones(100, 100) + torch.eye(100)
        >>> bits, error = renyi_entropy_estimate(gram, alpha=3, generator=generator)
        >>> bits, bool(error < 1e-4)
        (tensor(1.4784), True)

        >>> x, y = torch.ones(100, 100) + torch.eye(100), torch.eye(100)
        >>> parts = [renyi_entropy_estimate(*grams, alpha=3) for grams in ([x], [y], [x, y])]
        >>> information = parts[0].bits + parts[1].bits - parts[2].bits
        >>> error = torch.stack([part.error for part in parts]).norm()
    """
    check_variables(grams=grams)
    check_progress(progress)
    alpha = check_alpha(alpha)
    if needs_plain_formulas(*(gram.x if isinstance(gram, SampleGram) else gram for gram in grams)):
        raise RuntimeError(
            "An estimate has no derivative in forward mode, and none by the transforms of "
            "torch.func. Use an exact functional there, as renyi_entropy."
        )
    vectors = choose_vectors(alpha, grams[0].shape[-1], rank, probes, generator)
    variables = where_float64_is(grams)
    samples = [gram for gram in variables if isinstance(gram, SampleGram)]
    if len(samples) == len(variables):
        estimate = estimate_of_samples(samples, alpha, vectors, progress)
    else:
        matrices = [as_matrix(gram) for gram in variables]
        matrix = matrices[0]
        if len(matrices) > 1:
            matrix = joint_gram(matrices).to(compute_dtype(*matrices))
        estimate = estimate_of_matrix(matrix, alpha, vectors)
    return Estimate(*(as_result(value, grams) for value in estimate))
