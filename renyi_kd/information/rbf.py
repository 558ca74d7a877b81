r"""RBF Gram matrices of samples, and their gradient.

.. math:: K_{ij} = \exp(-\lVert x_i - x_j \rVert^2 / 2), \qquad
    -\lVert x_i - x_j \rVert^2 / 2 = x_i^\top x_j - x_i^\top x_i / 2 - x_j^\top x_j / 2

Distances one by one lose no digit of any samples. Much faster is the right-hand side, one product
of matrices. Its rounding error is in proportion to the squared distances of both samples from the
bulk of all, in bandwidths. It is meant by `by_product`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import gradients_by_operators, needs_plain_formulas
from renyi_kd.information.distances import distances
from renyi_kd.information.products import matrix_product, symmetric_product, symmetric_sum


def scaled_samples(x: Tensor, bandwidth: Tensor | float, *, by_product: bool) -> Tensor:
    """Return samples in units of the bandwidth, and for products around a point amid them.

    Args:
        x: samples, shape `(..., n, d)`, float32 or float64.
        bandwidth: a number, or a tensor that broadcasts.
        by_product: see above.
    """
    if isinstance(bandwidth, Tensor):
        bandwidth = bandwidth.to(x.dtype)
    return (x - _location(x) if by_product else x) / bandwidth


def rbf_gram(x: Tensor, *, by_product: bool) -> Tensor:
    """Return the RBF Gram matrix of `scaled_samples`, shape `(..., n, n)`, with all derivatives."""
    if torch.compiler.is_compiling() or needs_plain_formulas(x):
        return gram_by_operators(x, by_product=by_product)
    kernel: Tensor = _RBF.apply(x, by_product)
    return kernel


def rbf_by_operators(x: Tensor, y: Tensor, *, by_product: bool) -> Tensor:
    """Return the RBF kernel between `scaled_samples` by operators that have a derivative."""
    if not by_product:
        return (distances(x, y, 2.0).square() / -2).exp()
    product = matrix_product(x, y.mT)
    of_x, of_y = _halved_squares(x, y, product)
    exponents = product - of_x - of_y
    # Not clamped, since that would cut off derivatives, which are not zero at exponents of zero.
    return (exponents - exponents.detach().clamp(min=0)).exp()


def exponentials(x: Tensor, y: Tensor, *, by_product: bool) -> Tensor:
    """Return the RBF kernel between `scaled_samples`, shape `(..., n, m)`, without a gradient."""
    if not by_product:
        return distances(x, y, 2.0).square_().div_(-2).exp_()
    product = symmetric_product(x, x.mT) if x is y else matrix_product(x, y.mT)
    of_x, of_y = _halved_squares(x, y, product)
    return product.sub_(of_x).sub_(of_y).clamp_(max=0).exp_()


def _halved_squares(x: Tensor, y: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Return half of the squared lengths, shapes `(..., n, 1)` and `(..., 1, m)`."""
    if x is y:
        # From the product itself, equal samples, whose products are rounded alike, have an exponent
        # of zero.
        of_x = of_y = product.diagonal(dim1=-2, dim2=-1) / 2
    else:
        of_x, of_y = (z.square().sum(dim=-1) / 2 for z in (x, y))
    return of_x.unsqueeze(-1), of_y.unsqueeze(-2)


class PulledSamples:
    """The sums over j of pulls ij, which are symmetric, times the differences of samples j and i.

    Args:
        x: `scaled_samples`, shape `(..., n, d)`.
        by_product: whether they are around a point amid them.
    """

    def __init__(self, x: Tensor, *, by_product: bool) -> None:
        # There the difference of sums below rounds least.
        self.x = x if by_product else x - _location(x)
        self.sums: Tensor | None = None
        self.weights: Tensor | None = None

    def add(self, i: slice, j: slice, pulls: Tensor) -> None:
        """Add the pulls of an upper tile. Those of all pairs at once are overwritten."""
        if pulls.shape[-1] == self.x.shape[-2]:
            pulls.diagonal(dim1=-2, dim2=-1).sub_(pulls.sum(dim=-1))
            self.sums = matrix_product(pulls, self.x)
            return
        if self.sums is None or self.weights is None:
            self.sums, self.weights = torch.zeros_like(self.x), torch.zeros_like(self.x[..., 0])
        self.sums[..., i, :] += matrix_product(pulls, self.x[..., j, :])
        self.weights[..., i] += pulls.sum(dim=-1)
        if i != j:
            self.sums[..., j, :] += matrix_product(pulls.mT, self.x[..., i, :])
            self.weights[..., j] += pulls.sum(dim=-2)

    def total(self) -> Tensor:
        """Return the sums, shape `(..., n, d)`."""
        assert self.sums is not None
        if self.weights is None:
            return self.sums
        return self.sums.addcmul_(self.weights.unsqueeze(-1), self.x, value=-1)


def _location(x: Tensor) -> Tensor:
    """Return a point amid the samples, as a constant, shape `(..., 1, d)`.

    Distances do not depend on it, and inner products round less around it. It is the median of
    three samples, which an outlier does not move as it would move the mean.
    """
    x = x.detach()
    if torch.compiler.is_compiling():  # the number of the middle one would make n constant
        return x.median(dim=-2, keepdim=True).values
    n = x.shape[-2]
    first, middle, last = x[..., :1, :], x[..., n // 2 : n // 2 + 1, :], x[..., -1:, :]
    return middle.clamp(torch.minimum(first, last), torch.maximum(first, last))


class _RBF(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by_product: bool) -> Tensor:
        kernel = exponentials(x, x, by_product=by_product)
        ctx.by_product = by_product
        ctx.save_for_backward(x, kernel)
        return kernel

    @staticmethod
    def backward(ctx: Any, grad_kernel: Tensor) -> tuple[Tensor | None, None]:
        x, kernel = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_formulas(grad_kernel):
            plain = partial(gram_by_operators, by_product=ctx.by_product)
            return gradients_by_operators(plain, [x], grad_kernel)[0], None
        pulled, every = PulledSamples(x, by_product=ctx.by_product), slice(None)
        pulled.add(every, every, symmetric_sum(grad_kernel).mul_(kernel))
        return pulled.total(), None


def gram_by_operators(x: Tensor, *, by_product: bool) -> Tensor:
    """Do what `rbf_gram` does, by operators that have all derivatives."""
    if by_product or torch.compiler.is_compiling():
        return rbf_by_operators(x, x, by_product=by_product)
    # Not by distances, whose second derivative is infinite where they are zero.
    differences = x.unsqueeze(-2) - x.unsqueeze(-3)
    return (differences.square().sum(dim=-1) / -2).exp()
