r"""The RBF Gram matrix of samples by one product of matrices, and its gradient.

.. math:: K_{ij} = \exp(-\lVert x_i - x_j \rVert^2 / 2), \qquad
    -\lVert x_i - x_j \rVert^2 / 2 = x_i^\top x_j - x_i^\top x_i / 2 - x_j^\top x_j / 2

The squared lengths are taken from the diagonal of the product itself. So equal samples, whose
products are rounded alike, have an exponent of zero.
"""

from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import gradients_by_operators, needs_plain_formulas
from renyi_kd.information.distances import distances
from renyi_kd.information.products import matrix_product, symmetric_product, symmetric_sum


def scaled_samples(x: Tensor, bandwidth: Tensor | float) -> Tensor:
    """Return samples in units of the bandwidth, whose distances from each other can be told best.

    Args:
        x: samples, shape `(..., n, d)`, float32 or float64.
        bandwidth: a number, or a tensor that broadcasts.
    """
    if isinstance(bandwidth, Tensor):
        bandwidth = bandwidth.to(x.dtype)
    # Inner products round less around a point amid the samples; distances one by one, less without.
    return (x if x.dtype == torch.float64 else x - _location(x)) / bandwidth


def rbf_gram(x: Tensor) -> Tensor:
    """Return the RBF Gram matrix of `scaled_samples`, shape `(..., n, n)`, with all derivatives."""
    if torch.compiler.is_compiling() or needs_plain_formulas(x):
        return rbf_by_operators(x)
    kernel: Tensor = _RBF.apply(x)
    return kernel


def exponentials(x: Tensor, y: Tensor) -> Tensor:
    """Return the RBF kernel between `scaled_samples`, shape `(..., n, m)`, without a gradient.

    In float64 distances are taken one by one, so that no digit of any samples is lost. In float32
    they are taken by one product of matrices. Then an exponent has a rounding error in proportion
    to the squared distances of its two samples from the bulk of all.
    """
    if x.dtype == torch.float64:
        return distances(x, y, 2.0).square_().div_(-2).exp_()
    if x is y:
        kernel = symmetric_product(x, x.mT)
        of_x = of_y = kernel.diagonal(dim1=-2, dim2=-1) / 2
    else:
        kernel = matrix_product(x, y.mT)
        of_x, of_y = (z.square().sum(dim=-1) / 2 for z in (x, y))
    return kernel.sub_(of_x.unsqueeze(-1)).sub_(of_y.unsqueeze(-2)).clamp_(max=0).exp_()


class PulledSamples:
    """The sums over j of pulls ij, which are symmetric, times the differences of samples j and i.

    Args:
        x: `scaled_samples`, shape `(..., n, d)`.
    """

    def __init__(self, x: Tensor) -> None:
        # Around a point amid the samples, the difference of sums below rounds least.
        self.x = x - _location(x) if x.dtype == torch.float64 else x
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
        return x.mean(dim=-2, keepdim=True)
    n = x.shape[-2]
    first, middle, last = x[..., :1, :], x[..., n // 2 : n // 2 + 1, :], x[..., -1:, :]
    return middle.clamp(torch.minimum(first, last), torch.maximum(first, last))


def rbf_by_operators(x: Tensor) -> Tensor:
    """Do what `rbf_gram` does, by operators that have all derivatives."""
    if x.dtype == torch.float64:
        return (distances(x, x, 2.0).square() / -2).exp()
    product = matrix_product(x, x.mT)
    halves = product.diagonal(dim1=-2, dim2=-1) / 2
    return (product - halves.unsqueeze(-1) - halves.unsqueeze(-2)).clamp(max=0).exp()


class _RBF(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kernel = exponentials(x, x)
        ctx.save_for_backward(x, kernel)
        return kernel

    @staticmethod
    def backward(ctx: Any, grad_kernel: Tensor) -> Tensor | None:
        x, kernel = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_formulas(grad_kernel):
            return gradients_by_operators(rbf_by_operators, [x], grad_kernel)[0]
        pulled, every = PulledSamples(x), slice(None)
        pulled.add(every, every, symmetric_sum(grad_kernel).mul_(kernel))
        return pulled.total()
