r"""Estimates of :math:`\operatorname{tr} A^\alpha` from products of A with blocks of vectors alone.

A randomised range finder takes the large eigenvalues; random probes of its complement stand for
the rest. From both sets of vectors a few Lanczos steps give quadrature rules for
:math:`v^\top A^\alpha v`, and what is known exactly, the trace and the Frobenius norm, takes most
of the variance off the probes.

Sources: N. Halko, P.-G. Martinsson, J. A. Tropp, Finding structure with randomness, 2011 (the range
finder); G. H. Golub, G. Meurant, Matrices, Moments and Quadrature, 1994 (Gauss and Gauss-Radau
rules); S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
2017.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kd._checks import check_integer

MIN_ALPHA = 1.5


@dataclass(frozen=True)
class Lanczos:
    """Options of `method="lanczos"`, to be given in its place.

    Args:
        rank: vectors of the range finder. Default: 16, and 64 below alpha 2.
        probes: random vectors of its complement, at least 2. Default: 8, and 32 below alpha 2.
        generator: of the random vectors, on the device of the matrices. Default: that of PyTorch.
            Do not seed it as the data were: vectors drawn like the samples are not independent.

    Raises:
        TypeError, ValueError: a number that is no integer or too small, or no generator.

    Example:
        >>> from renyi_kd import renyi_entropy
        >>> gram = torch.ones(100, 100) + torch.eye(100)
        >>> generator = torch.Generator().manual_seed(0)
        >>> method = Lanczos(rank=4, probes=4, generator=generator)
        >>> bits, error = renyi_entropy(gram, 3, method=method, return_error=True)
        >>> bits, bool(error < 1e-4)
        (tensor(1.4784), True)
    """

    rank: int | None = None
    probes: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_integer("rank", self.rank, minimum=1)
        if self.probes is not None:
            check_integer("probes", self.probes, minimum=2)
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(
                f"`generator` must be a torch.Generator or None, got "
                f"{type(self.generator).__name__}. Use torch.Generator().manual_seed(...)."
            )

    def sizes(self, alpha: float, n: int) -> tuple[int, int]:
        """The rank and the number of probes at this order.

        Raises:
            ValueError: the order or the number of samples cannot be served.
        """
        if not MIN_ALPHA <= alpha < math.inf:
            raise ValueError(
                f"`method` 'lanczos' needs a finite alpha >= {MIN_ALPHA}, got alpha = {alpha}: "
                f"below it small eigenvalues count, of which a few vectors see too little. "
                f"Use 'eigvalsh'."
            )
        rank = self.rank or (16 if alpha >= 2 else 64)
        probes = self.probes or (8 if alpha >= 2 else 32)
        if rank + probes >= n:
            raise ValueError(
                f"`method` 'lanczos' needs n > rank + probes, got n = {n} and {rank} + {probes}. "
                f"Use 'eigvalsh', or Lanczos(rank=..., probes=...) with fewer."
            )
        return rank, probes


class PowerTrace(NamedTuple):
    r"""An estimate of :math:`\tau = \operatorname{tr} A^\alpha`, and of its gradient.

    The gradient :math:`\alpha A^{\alpha - 1}` is about
    :math:`(L R^\top + R L^\top) / 2 + c_0 I + c_1 A`.
    """

    value: Tensor
    error: Tensor
    left: Tensor
    right: Tensor
    constant: Tensor
    slope: Tensor


def power_trace(
    product: Callable[[Tensor], Tensor],
    squared_norm: Tensor,
    alpha: float,
    like: Tensor,
    options: Lanczos,
) -> PowerTrace:
    """Estimate the trace of a power of a matrix of trace one.

    Args:
        product: of the matrix with a block of vectors `(..., n, k)`.
        squared_norm: its squared Frobenius norm, float64, shape `(...)`.
        alpha: exponent >= 1.5.
        like: dtype, device and shape `(..., n, any)` of the vectors.
        options: see `Lanczos`.

    Returns:
        The estimate and its standard error, float64, shape `(...)`; factors `(..., n, rank)`.
    """
    *batch, n, _ = like.shape
    rank, probes = options.sizes(alpha, n)
    rest, rounding = n - rank, torch.finfo(like.dtype).eps * math.sqrt(n) / 2
    steps = max(2, math.ceil(alpha / 4))

    noise = torch.randn(
        *batch, n, rank + probes, dtype=like.dtype, device=like.device, generator=options.generator
    )
    # Orthonormal: the range of A, and probes spread evenly over the unit sphere of its complement.
    block = torch.cat([product(noise[..., :rank]), noise[..., rank:]], dim=-1)
    poison = 0 * block.double().sum(dim=(-2, -1))
    vectors = torch.linalg.qr(block.nan_to_num(0, 0, 0)).Q
    images = product(vectors)
    range_, range_image = vectors[..., :rank], images[..., :rank]
    _, rotation = _eigh(range_.mT @ range_image)
    range_, range_image = range_ @ rotation, range_image @ rotation
    basis, diagonal, off = _lanczos_steps(
        product,
        torch.cat([range_, vectors[..., rank:]], dim=-1),
        torch.cat([range_image, images[..., rank:]], dim=-1),
        steps,
    )
    nodes, eigenvectors = _gauss_and_radau(diagonal, off)
    weights = eigenvectors[..., 0, :].square()

    # Below alpha = 2 * steps the rules bracket v'A^alpha v, and are exact at the two ends of this.
    between = alpha / (2 * steps)
    gauss, radau = (weights * nodes**alpha).sum(dim=-1)
    values = torch.lerp(gauss, radau, between)
    of_range, of_probes = values[..., :rank], values[..., rank:]
    gap = (gauss - radau).abs() * (max(1.0, between**2) / 3)
    bias = gap[..., :rank].sum(dim=-1) + rest * gap[..., rank:].mean(dim=-1)

    # Control variates: v'Av and v'AAv, whose sums over the complement are known.
    ritz, first = diagonal[0][..., :rank], diagonal[0][..., rank:]
    second = first.square() + off[0][..., rank:].square()
    known_first = 1 - ritz.sum(dim=-1)
    known_second = squared_norm - _dot(range_image, range_image).sum(dim=-1)
    spectrum = nodes[1][..., rank:, :].flatten(-2), weights[1][..., rank:, :].flatten(-2) / probes
    slope, bend, shift = _quadratic_fit(*spectrum, spectrum[0] ** alpha)
    # Without replacement, as the probes are orthogonal.
    to_error = rest * math.sqrt((rest - probes) / (rest * probes))

    def trusted(coefficient: Tensor, variate: Tensor, doubt: Tensor | float) -> Tensor:
        """The less, the more the rounding of the known sum weighs against the variance."""
        variance = (to_error * variate.std(dim=-1)).square()
        return coefficient * _ratio(variance, variance + doubt**2)

    doubt = rounding * squared_norm
    bend = trusted(bend, second - shift.unsqueeze(-1) * first, doubt)
    slope = trusted(slope, first, rounding) - bend * shift
    value = of_range.sum(dim=-1) + rest * of_probes.mean(dim=-1)
    value = value + slope * (known_first - rest * first.mean(dim=-1))
    value = value + bend * (known_second - rest * second.mean(dim=-1))
    residual = of_probes - slope.unsqueeze(-1) * first - bend.unsqueeze(-1) * second
    of_rounding = rounding * alpha * (ritz.clamp(min=0) ** alpha).sum(dim=-1)
    # A standard deviation from few probes, less two fits, is as uncertain as Student's t says.
    freedom = max(3, probes - 3)
    deviation = to_error * residual.std(dim=-1) * math.sqrt(freedom / (freedom - 2))
    errors = [deviation, slope * rounding, bend * doubt, of_rounding]
    error = torch.linalg.vector_norm(torch.stack(errors), dim=0) + bias
    # No trace of a power is below that of its largest Ritz value.
    value = value.maximum(ritz.amax(dim=-1).clamp(min=0) ** alpha)

    # alpha A^(alpha - 1) is a line on the complement, and what differs from it on the range.
    derivative = alpha * spectrum[0] ** (alpha - 1)
    tilt, *_ = _quadratic_fit(*spectrum, derivative)
    level = (spectrum[1] * (derivative - tilt.unsqueeze(-1) * spectrum[0])).sum(dim=-1)
    line = level[..., None, None] + tilt[..., None, None] * nodes
    beyond = eigenvectors[..., 0, :] * (alpha * nodes ** (alpha - 1) - line)
    gauss, radau = (eigenvectors[..., :-1, :] * beyond.unsqueeze(-2)).sum(dim=-1)
    mixture = torch.lerp(gauss, radau, between)[..., :rank, :].to(like.dtype)
    applied = (torch.stack(basis, dim=-1)[..., :rank, :] * mixture.unsqueeze(-3)).sum(dim=-1)
    # What leads out of the range does so on both sides.
    right = 2 * applied - range_ @ (range_.mT @ applied)
    return PowerTrace(value + poison, error + poison, range_, right, level, tilt)


def _lanczos_steps(
    product: Callable[[Tensor], Tensor], start: Tensor, image: Tensor, steps: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Basis, diagonal and off-diagonal of a Lanczos process from each column of `start`."""
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    vector = start
    for step in range(steps):
        residual = product(vector) if step else image
        basis.append(vector)
        diagonal.append(_ratio(_dot(vector, residual), _dot(vector, vector)))
        for u in basis + basis:  # twice is enough
            residual = residual - u * _dot(u, residual).to(u.dtype).unsqueeze(-2)
        norm = _dot(residual, residual).sqrt()
        rounding = 4 * torch.finfo(start.dtype).eps * diagonal[0].amax(dim=-1, keepdim=True)
        off.append(torch.where(norm > rounding, norm, 0.0))
        vector = _ratio(residual, off[-1].to(start.dtype).unsqueeze(-2))
    return basis, diagonal, off


def _gauss_and_radau(diagonal: list[Tensor], off: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Nodes and eigenvectors of the Gauss rule, and of the Gauss-Radau rule with a node at 0."""
    pivot = diagonal[0]
    for d, o in zip(diagonal[1:], off, strict=False):
        pivot = d - _ratio(o.square(), pivot)
        pivot = torch.where(pivot > 1e-6 * d, pivot, 0.0)
    zero = torch.zeros_like(pivot)
    last = torch.where(pivot > 0, off[-1], 0.0)
    gauss = [*diagonal, zero], [*off[:-1], zero]
    radau = [*diagonal, _ratio(last.square(), pivot)], [*off[:-1], last]
    jacobi = [
        torch.stack(main, dim=-1).diag_embed() + torch.stack(side, dim=-1).diag_embed(-1)
        for main, side in (gauss, radau)
    ]
    nodes, eigenvectors = _eigh(torch.stack(jacobi))
    return nodes.clamp(min=0), eigenvectors


def _quadratic_fit(x: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares a, b, s of y = constant + a x + b (x^2 - s x), the two uncorrelated."""

    def centred(z: Tensor) -> Tensor:
        return z - (weight * z).sum(dim=-1, keepdim=True)

    def covariance(z: Tensor, w: Tensor) -> Tensor:
        return (weight * z * w).sum(dim=-1)

    largest = x.amax(dim=-1)
    line, square, y = centred(x), centred(x * x), centred(y)
    of_line = covariance(line, line)
    of_line = torch.where(of_line > 1e-20 * largest**2, of_line, 0.0)
    shift = _ratio(covariance(square, line), of_line)
    curve = square - shift.unsqueeze(-1) * line
    of_curve = covariance(curve, curve)
    of_curve = torch.where(of_curve > 1e-20 * largest**4, of_curve, 0.0)
    return _ratio(covariance(y, line), of_line), _ratio(covariance(y, curve), of_curve), shift


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of the lower triangle; LAPACK and cuSOLVER raise on NaN, for which zero stands in."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix.nan_to_num(0, 0, 0))
    return eigenvalues, eigenvectors


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(dim=-2, dtype=torch.float64)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Quotient a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
