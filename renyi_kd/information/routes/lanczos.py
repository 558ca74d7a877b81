"""Entropies by Lanczos quadrature, of a matrix and of kernels of samples tile by tile."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import first_derivative_only
from renyi_kd._precision import compute_dtype, ieee_dtype
from renyi_kd.information.kernels import hadamard_product, inverse_trace
from renyi_kd.information.routes.quadrature import PowerTrace, Vectors, power_trace
from renyi_kd.information.routes.tiles import (
    Evaluate,
    Progress,
    each_tile,
    gradients_of_samples,
    kernels_of,
    tiled_kernels,
)
from renyi_kd.information.samples import SampleGram


def estimate_of_matrix(gram: Tensor, alpha: float, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Return the entropy of a symmetric matrix of shape `(..., n, n)` and its standard error.

    Both are in bits, float64, of shape `(...)`. The entropy has no second derivative, and the error
    passes no gradient.
    """
    bits, error = _EstimateOfMatrix.apply(gram, alpha, vectors)
    return bits, error


def estimate_of_samples(
    grams: Sequence[SampleGram], alpha: float, vectors: Vectors, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Return the same of the joint of kernels of samples, whose leading dimensions broadcast."""
    matrices, diagonals = tiled_kernels(grams)
    trace = hadamard_product(diagonals, range(len(grams))).sum(dim=-1)
    evaluate = [matrix.evaluate for matrix in matrices]
    bits, error = _EstimateOfSamples.apply(
        alpha, vectors, evaluate, progress, trace, *(matrix.samples for matrix in matrices)
    )
    return bits, error


class _EstimateOfMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, alpha: float, vectors: Vectors) -> tuple[Tensor, Tensor]:
        dtype = ieee_dtype(compute_dtype(gram), gram.device)
        matrix = gram.to(dtype)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
        scale = inverse_trace(trace)
        # The squares may be summed in float32, unless they leave its range.
        mean = trace / matrix.shape[-1]
        in_range = bool(((mean > 1e-12) & (mean < 1e12)).all())
        norms = torch.linalg.vector_norm(matrix, dim=-1, dtype=None if in_range else torch.float64)
        squared_norm = (norms.double() * scale[..., None]).square().sum(dim=-1)

        def product(block: Tensor) -> Tensor:
            return (matrix @ block) * scale.to(dtype)[..., None, None]

        with torch.autocast(gram.device.type, enabled=False):
            estimate = power_trace(product, squared_norm, alpha, matrix[..., :1], vectors)
        ctx.alpha = alpha
        ctx.save_for_backward(gram, scale, *estimate)
        bits, error = _in_bits(estimate, alpha, trace)
        ctx.mark_non_differentiable(error)
        return bits, error

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_bits: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gram, scale, *saved = ctx.saved_tensors
        estimate = PowerTrace(*saved)
        grad_power, grad_trace = _gradients_of_power_and_trace(
            grad_bits, estimate, ctx.alpha, scale
        )
        left, right = _symmetric_factors(estimate, grad_power)
        with torch.autocast(gram.device.type, enabled=False):
            gradient = left @ right.mT
        line = (grad_power * estimate.slope * scale).to(gradient.dtype)
        gradient += gram * line[..., None, None]
        grad_diagonal = grad_power * estimate.constant + grad_trace
        gradient.diagonal(dim1=-2, dim2=-1).add_(grad_diagonal[..., None])
        return gradient.to(gram.dtype), None, None


class _EstimateOfSamples(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        alpha: float,
        vectors: Vectors,
        evaluate: Sequence[Evaluate],
        progress: Progress | None,
        trace: Tensor,
        *samples: Tensor,
    ) -> tuple[Tensor, Tensor]:
        matrices, all_of_them = kernels_of(samples, evaluate), range(len(evaluate))
        scale = inverse_trace(trace)
        squared_norm = torch.zeros_like(trace)

        def product(block: Tensor) -> Tensor:
            """Multiply, and fill in the squared norm on the way."""
            image, square = torch.zeros_like(block), torch.zeros_like(trace)
            for i, j, entries in each_tile(matrices, progress):
                tile = hadamard_product(entries, all_of_them)
                image[..., i, :] += tile @ block[..., j, :]
                if i != j:
                    image[..., j, :] += tile.mT @ block[..., i, :]
                square += (1 if i == j else 2) * tile.square().sum(dim=(-2, -1))
            squared_norm.copy_(square * scale * scale)
            return image * scale[..., None, None]

        estimate = power_trace(product, squared_norm, alpha, samples[0], vectors)
        ctx.alpha, ctx.evaluate, ctx.progress = alpha, evaluate, progress
        ctx.save_for_backward(scale, *estimate, *samples)
        bits, error = _in_bits(estimate, alpha, trace)
        ctx.mark_non_differentiable(error)
        return bits, error

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_bits: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        fields = len(PowerTrace._fields)
        estimate, samples = PowerTrace(*saved[:fields]), saved[fields:]
        grad_power, grad_trace = _gradients_of_power_and_trace(
            grad_bits, estimate, ctx.alpha, scale
        )
        left, right = _symmetric_factors(estimate, grad_power)
        line = (grad_power * estimate.slope * scale)[..., None, None]
        grad_diagonal = (grad_power * estimate.constant)[..., None]
        all_of_them = range(len(ctx.evaluate))

        def gradients_of_entries(
            entries: list[Tensor], i: slice, j: slice, wanted: list[int]
        ) -> list[Tensor]:
            joint = hadamard_product(entries, all_of_them)
            grad_joint = left[..., i, :] @ right[..., j, :].mT + line * joint
            if i == j:
                grad_joint.diagonal(dim1=-2, dim2=-1).add_(grad_diagonal)
            else:
                grad_joint *= 2
            return [
                hadamard_product([*entries, grad_joint], [u for u in (*all_of_them, -1) if u != v])
                for v in wanted
            ]

        matrices = kernels_of(samples, ctx.evaluate)
        needed = ctx.needs_input_grad[5:]
        gradients = gradients_of_samples(matrices, gradients_of_entries, needed, ctx.progress)
        return None, None, None, None, grad_trace, *gradients


def _in_bits(estimate: PowerTrace, alpha: float, trace: Tensor) -> tuple[Tensor, Tensor]:
    """Return entropy and error in bits; both are 0 for a zero matrix."""
    zero = (trace == 0) & (estimate.value == 0)
    bits = torch.where(zero, 1.0, estimate.value).log2() / (1 - alpha)
    relative_error = torch.where(zero, 0.0, estimate.error / estimate.value)
    return bits, relative_error / ((alpha - 1) * math.log(2))


def _gradients_of_power_and_trace(
    grad_bits: Tensor, estimate: PowerTrace, alpha: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return what the gradients through the power and through the trace are multiplied with.

    The entropy of K is a multiple of :math:`\log(\operatorname{tr} K^\alpha / t^\alpha)`, where
    :math:`t` is the trace. The first factor belongs to the gradient of
    :math:`\operatorname{tr} A^\alpha` at :math:`A = K / t`, which `PowerTrace` holds, and contains
    the 1 / t of the inner derivative. The second is the gradient of :math:`t` in the denominator.
    """
    grad_log = grad_bits / ((1 - alpha) * math.log(2))
    zero = estimate.value == 0
    grad_power = torch.where(zero, 0.0, grad_log * scale / estimate.value)
    grad_trace = torch.where(zero, 0.0, -alpha * grad_log * scale)
    return grad_power, grad_trace


def _symmetric_factors(estimate: PowerTrace, grad_power: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of twice the rank, whose product is the low-rank part of the gradient."""
    half = (grad_power / 2).to(estimate.left.dtype)[..., None, None]
    left = torch.cat([estimate.left, estimate.right], dim=-1) * half
    return left, torch.cat([estimate.right, estimate.left], dim=-1)
