r"""Estimates of :math:`\operatorname{tr} A^\alpha` from products of A with blocks of vectors alone.

A randomised range finder takes the large eigenvalues. Random probes of the complement of that range
stand for the rest. From both sets of vectors a few Lanczos steps give quadrature rules for
:math:`v^\top A^\alpha v`. The trace and the Frobenius norm of A are known exactly, and as control
variates they take most of the variance off the probes.

Sources: N. Halko, P.-G. Martinsson, J. A. Tropp, Finding structure with randomness, 2011 (the range
finder); G. H. Golub, G. Meurant, Matrices, Moments and Quadrature, 1994 (Gauss and Gauss-Radau
rules); S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
2017.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kd._checks import check_integer

# Below this order small eigenvalues count, of which a few vectors see too little.
_MIN_ALPHA = 1.5


class Vectors(NamedTuple):
    """How many random vectors there are, and who draws them."""

    rank: int
    """Vectors that find the range of the matrix."""
    probes: int
    """Vectors that probe the complement of that range."""
    generator: torch.Generator | None


def choose_vectors(
    alpha: float,
    n: int,
    rank: int | None,
    probes: int | None,
    generator: torch.Generator | None,
) -> Vectors:
    """Return the numbers of vectors for this order, by default 16 and 8, below order 2 64 and 32.

    Raises:
        TypeError: `rank` or `probes` is no integer, or `generator` no generator.
        ValueError: a number is too small, or the order or the number of samples cannot be served.
    """
    if rank is not None:
        check_integer("rank", rank, minimum=1)
    if probes is not None:
        check_integer("probes", probes, minimum=2)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {type(generator).__name__}. "
            f"Use torch.Generator().manual_seed(...)."
        )
    if not _MIN_ALPHA <= alpha < math.inf:
        raise ValueError(
            f"`alpha` of an estimate must be finite and >= {_MIN_ALPHA}, got {alpha}: below it "
            f"small eigenvalues count, of which a few vectors see too little. "
            f"Call renyi_joint_entropy."
        )
    rank = rank or (16 if alpha >= 2 else 64)
    probes = probes or (8 if alpha >= 2 else 32)
    if rank + probes >= n:
        raise ValueError(
            f"An estimate needs n > rank + probes, got n = {n} and {rank} + {probes}. "
            f"Give a smaller `rank` and fewer `probes`, or call renyi_joint_entropy, the exact one."
        )
    return Vectors(rank, probes, generator)


class PowerTrace(NamedTuple):
    r"""An estimate of :math:`\operatorname{tr} A^\alpha`, and of its gradient.

    The gradient :math:`\alpha A^{\alpha - 1}` is about
    :math:`(L R^\top + R L^\top) / 2 + c_0 I + c_1 A`.
    """

    value: Tensor
    """The estimate, float64, shape `(...)`."""
    error: Tensor
    """Its standard error, float64, shape `(...)`."""
    left: Tensor
    """L, shape `(..., n, rank)`."""
    right: Tensor
    """R, shape `(..., n, rank)`."""
    constant: Tensor
    """c_0, shape `(...)`."""
    slope: Tensor
    """c_1, shape `(...)`."""


def power_trace(
    product: Callable[[Tensor], Tensor],
    squared_norm: Tensor,
    alpha: float,
    like: Tensor,
    vectors: Vectors,
) -> PowerTrace:
    """Estimate the trace of a power of a symmetric positive semi-definite matrix of trace one.

    Args:
        product: of the matrix with a block of vectors `(..., n, k)`. It is called once before
            `squared_norm` is read, and may fill it in.
        squared_norm: the squared Frobenius norm of the matrix, float64, shape `(...)`.
        alpha: exponent >= 1.5.
        like: a tensor with the dtype, the device and the shape `(..., n, any)` of the vectors.
        vectors: how many there are, see `choose_vectors`.
    """
    process = _LanczosProcess(product, alpha, like, vectors)
    value, error = process.trace_and_error(squared_norm)
    gradient = process.gradient()
    return PowerTrace(value + process.zero_or_nan, error + process.zero_or_nan, *gradient)


class _LanczosProcess:
    """Lanczos steps from each vector of a range and of its complement, and the rules they give.

    Attributes:
        zero_or_nan: NaN where a product was not finite. The decompositions below do not accept NaN,
            so it is set aside here and added to the results.
        range, range_image: the Ritz vectors, shape `(..., n, rank)`, and their products.
        basis: the vectors of each step, shape `(..., n, rank + probes)`.
        diagonal, off_diagonal: the entries of the tridiagonal matrix of each vector, one tensor
            `(..., rank + probes)` a step.
        nodes, eigenvectors: of the Gauss and of the Gauss-Radau rule, stacked.
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], alpha: float, like: Tensor, vectors: Vectors
    ) -> None:
        *batch, self.n, _ = like.shape
        self.alpha = alpha
        self.rank, self.probes, generator = vectors
        self.epsilon = torch.finfo(like.dtype).eps
        steps = max(2, math.ceil(alpha / 4))
        # For alpha up to 2 * steps, v'A^alpha v lies between the Gauss and the Gauss-Radau rule,
        # and nearer to the latter the larger alpha is. The two are mixed in this proportion. For
        # larger alpha the same line is followed beyond the Gauss-Radau rule.
        self.mixture = alpha / (2 * steps)

        noise = torch.randn(
            *batch,
            self.n,
            self.rank + self.probes,
            dtype=like.dtype,
            device=like.device,
            generator=generator,
        )
        found, noise = product(noise[..., : self.rank]), noise[..., self.rank :]
        block = torch.cat([found, noise], dim=-1)
        self.zero_or_nan = 0 * block.double().sum(dim=(-2, -1))
        # Orthonormal vectors: first of the range, then probes spread evenly over the unit sphere of
        # its complement.
        block = torch.linalg.qr(block.nan_to_num(0, 0, 0)).Q
        image = product(block)
        range_, range_image = block[..., : self.rank], image[..., : self.rank]
        _, rotation = _eigh(range_.mT @ range_image)
        self.range, self.range_image = range_ @ rotation, range_image @ rotation
        self.basis, self.diagonal, self.off_diagonal = _lanczos_steps(
            product,
            torch.cat([self.range, block[..., self.rank :]], dim=-1),
            torch.cat([self.range_image, image[..., self.rank :]], dim=-1),
            steps,
        )
        self.nodes, self.eigenvectors = _gauss_and_radau(self.diagonal, self.off_diagonal)

    @property
    def weights(self) -> Tensor:
        """The weights of the nodes of both rules."""
        return self.eigenvectors[..., 0, :].square()

    def spectrum_of_complement(self) -> tuple[Tensor, Tensor]:
        """Return nodes and weights that stand for the spectrum off the range."""
        nodes = self.nodes[1][..., self.rank :, :].flatten(-2)
        weights = self.weights[1][..., self.rank :, :].flatten(-2) / self.probes
        return nodes, weights

    def trace_and_error(self, squared_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate and its standard error."""
        rank, probes, rest = self.rank, self.probes, self.n - self.rank
        gauss, radau = (self.weights * self.nodes**self.alpha).sum(dim=-1)
        values = torch.lerp(gauss, radau, self.mixture)
        of_range, of_probes = values[..., :rank], values[..., rank:]
        # How far the mixture is off: a third of the distance between the rules, a figure from
        # trials, and more the further the line is followed beyond them.
        gap = (gauss - radau).abs() * (max(1.0, self.mixture**2) / 3)
        bias = gap[..., :rank].sum(dim=-1) + rest * gap[..., rank:].mean(dim=-1)

        # The control variates are v'Av and v'AAv, whose sums over the complement are known.
        ritz_values, first = self.diagonal[0][..., :rank], self.diagonal[0][..., rank:]
        second = first.square() + self.off_diagonal[0][..., rank:].square()
        known_first = 1 - ritz_values.sum(dim=-1)
        known_second = squared_norm - _dot(self.range_image, self.range_image).sum(dim=-1)
        nodes, weights = self.spectrum_of_complement()
        slope, bend, shift = _quadratic_fit(nodes, weights, nodes**self.alpha)

        # The standard error of a sum over the complement from the spread of the probes. They are
        # orthogonal, so the correction for drawing without replacement applies.
        to_error = rest * math.sqrt((rest - probes) / (rest * probes))
        # The rounding errors of the n terms of a sum grow like a random walk.
        rounding = self.epsilon * math.sqrt(self.n) / 2
        norm_rounding = rounding * squared_norm

        def trusted(coefficient: Tensor, variate: Tensor, rounding: Tensor | float) -> Tensor:
            """Take less of a variate, the more the rounding of its known sum weighs."""
            variance = (to_error * variate.std(dim=-1)).square()
            return coefficient * _ratio(variance, variance + rounding**2)

        bend = trusted(bend, second - shift.unsqueeze(-1) * first, norm_rounding)
        slope = trusted(slope, first, rounding) - bend * shift
        value = of_range.sum(dim=-1) + rest * of_probes.mean(dim=-1)
        value = value + slope * (known_first - rest * first.mean(dim=-1))
        value = value + bend * (known_second - rest * second.mean(dim=-1))
        # No trace of a power is below that of its largest Ritz value.
        value = value.maximum(ritz_values.amax(dim=-1).clamp(min=0) ** self.alpha)

        residual = of_probes - slope.unsqueeze(-1) * first - bend.unsqueeze(-1) * second
        # A standard deviation from few probes, of which two fits have used up two, is itself
        # uncertain. The factor is the standard deviation of Student's t.
        freedom = max(3, probes - 3)
        deviation = to_error * residual.std(dim=-1) * math.sqrt(freedom / (freedom - 2))
        of_rounding = rounding * self.alpha * (ritz_values.clamp(min=0) ** self.alpha).sum(dim=-1)
        errors = torch.stack([deviation, slope * rounding, bend * norm_rounding, of_rounding])
        return value, torch.linalg.vector_norm(errors, dim=0) + bias

    def gradient(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Return left and right factor, constant and slope of `PowerTrace`.

        On the complement :math:`\alpha A^{\alpha - 1}` is fitted by a line in A. The factors are
        what differs from the line on the range.
        """
        alpha, rank = self.alpha, self.rank
        nodes, weights = self.spectrum_of_complement()
        derivative = alpha * nodes ** (alpha - 1)
        slope, *_ = _quadratic_fit(nodes, weights, derivative)
        constant = (weights * (derivative - slope.unsqueeze(-1) * nodes)).sum(dim=-1)

        line = constant[..., None, None] + slope[..., None, None] * self.nodes
        beyond_line = alpha * self.nodes ** (alpha - 1) - line
        coefficients = self.eigenvectors[..., 0, :] * beyond_line
        gauss, radau = (self.eigenvectors[..., :-1, :] * coefficients.unsqueeze(-2)).sum(dim=-1)
        mixed = torch.lerp(gauss, radau, self.mixture)[..., :rank, :].to(self.range.dtype)
        basis = torch.stack(self.basis, dim=-1)[..., :rank, :]
        applied = (basis * mixed.unsqueeze(-3)).sum(dim=-1)
        # `applied` is the difference from the line, applied to the range. In the symmetric form
        # (L R' + R L') / 2 its part within the range counts twice and its part that leads out of
        # the range once on each side. So the former is taken once and the latter twice.
        right = 2 * applied - self.range @ (self.range.mT @ applied)
        return self.range, right, constant, slope


def _lanczos_steps(
    product: Callable[[Tensor], Tensor], start: Tensor, image: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return basis, diagonal and off-diagonal of a Lanczos process from each column of `start`."""
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    vector = start
    for step in range(steps):
        residual = product(vector) if step else image
        basis.append(vector)
        diagonal.append(_ratio(_dot(vector, residual), _dot(vector, vector)))
        for u in basis + basis:  # orthogonalising twice makes up for rounding
            residual = residual - u * _dot(u, residual).to(u.dtype).unsqueeze(-2)
        norm = _dot(residual, residual).sqrt()
        rounding = 4 * torch.finfo(start.dtype).eps * diagonal[0].amax(dim=-1, keepdim=True)
        off_diagonal.append(torch.where(norm > rounding, norm, 0.0))
        vector = _ratio(residual, off_diagonal[-1].to(start.dtype).unsqueeze(-2))
    return basis, diagonal, off_diagonal


def _gauss_and_radau(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return nodes and eigenvectors of the Gauss rule and of the Gauss-Radau rule with a node at 0.

    They are those of tridiagonal matrices one larger than the process. That of the Gauss rule has
    an empty last row. That of the Gauss-Radau rule has the last entry that makes it singular.
    """
    pivot = diagonal[0]
    for main, side in zip(diagonal[1:], off_diagonal, strict=False):
        pivot = main - _ratio(side.square(), pivot)
        pivot = torch.where(pivot > 1e-6 * main, pivot, 0.0)
    zero = torch.zeros_like(pivot)
    last = torch.where(pivot > 0, off_diagonal[-1], 0.0)
    gauss = [*diagonal, zero], [*off_diagonal[:-1], zero]
    radau = [*diagonal, _ratio(last.square(), pivot)], [*off_diagonal[:-1], last]
    tridiagonal = [
        torch.stack(main, dim=-1).diag_embed() + torch.stack(side, dim=-1).diag_embed(-1)
        for main, side in (gauss, radau)
    ]
    nodes, eigenvectors = _eigh(torch.stack(tridiagonal))
    return nodes.clamp(min=0), eigenvectors


def _quadratic_fit(x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit y = constant + a x + b (x^2 - s x) by least squares, and return a, b and s.

    The shift s is chosen so that the two terms are uncorrelated.
    """

    def centred(z: Tensor) -> Tensor:
        return z - (weight * z).sum(dim=-1, keepdim=True)

    def covariance(z: Tensor, w: Tensor) -> Tensor:
        return (weight * z * w).sum(dim=-1)

    largest = x.amax(dim=-1)
    line, square, y = centred(x), centred(x * x), centred(y)
    variance_of_line = covariance(line, line)
    variance_of_line = torch.where(variance_of_line > 1e-20 * largest**2, variance_of_line, 0.0)
    shift = _ratio(covariance(square, line), variance_of_line)
    curve = square - shift.unsqueeze(-1) * line
    variance_of_curve = covariance(curve, curve)
    variance_of_curve = torch.where(variance_of_curve > 1e-20 * largest**4, variance_of_curve, 0.0)
    slope = _ratio(covariance(y, line), variance_of_line)
    bend = _ratio(covariance(y, curve), variance_of_curve)
    return slope, bend, shift


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose the lower triangle. LAPACK and cuSOLVER raise on NaN, which becomes zero."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.nan_to_num(0, 0, 0))
    return eigenvalues, eigenvectors


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """Return the inner products of columns, in float64."""
    return (u * v).sum(dim=-2, dtype=torch.float64)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return the quotient a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
