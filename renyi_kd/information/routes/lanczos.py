"""Entropies by `quadrature`: of a matrix, and of kernels of samples tile by tile."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import first_derivative_only
from renyi_kd._precision import compute_dtype, ieee_dtype
from renyi_kd.information.routes.frobenius import joint
from renyi_kd.information.routes.quadrature import Lanczos, PowerTrace, power_trace
from renyi_kd.information.routes.tiles import Progress, assemble, each_tile, ends_of, pull_back
from renyi_kd.information.samples import SampleGram


def estimated_entropy(gram: Tensor, alpha: float, options: Lanczos) -> tuple[Tensor, Tensor]:
    """Entropy of a symmetric matrix of shape `(..., n, n)` and its standard error.

    Both in bits, float64, shape `(...)`. They have no second derivative, the error none at all.
    """
    bits, error = _OfMatrix.apply(gram, alpha, options)
    return bits, error


def estimated_entropy_of_samples(
    grams: Sequence[SampleGram], alpha: float, options: Lanczos, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """As `estimated_entropy`, of the joint of kernels of samples, all of one shape."""
    tiles = [gram.tiles() for gram in grams]
    trace = joint([x.diagonal for x in tiles], range(len(grams))).sum(dim=-1)
    bits, error = _OfSamples.apply(
        alpha, options, [x.evaluate for x in tiles], progress, trace, *ends_of(tiles)
    )
    return bits, error


class _OfMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, alpha: float, options: Lanczos) -> tuple[Tensor, Tensor]:
        dtype = ieee_dtype(compute_dtype(gram), gram.device)
        matrix = gram.to(dtype)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
        scale = _reciprocal(trace)
        # Squares in float32 are enough, unless out of its range.
        mean = trace / matrix.shape[-1]
        ordinary = bool(((mean > 1e-12) & (mean < 1e12)).all())
        precision = None if ordinary else torch.float64
        rows = torch.linalg.vector_norm(matrix, dim=-1, dtype=precision).double()
        squared_norm = (rows * scale[..., None]).square().sum(dim=-1)

        def product(vectors: Tensor) -> Tensor:
            return (matrix @ vectors) * scale.to(dtype)[..., None, None]

        with torch.autocast(gram.device.type, enabled=False):
            estimate = power_trace(product, squared_norm, alpha, matrix[..., :1], options)
        ctx.alpha = alpha
        ctx.save_for_backward(gram, scale, *estimate)
        bits, error = _in_bits(estimate, alpha, trace)
        ctx.mark_non_differentiable(error)
        return bits, error

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gram, scale, *factors = ctx.saved_tensors
        estimate = PowerTrace(*factors)
        of_power, of_trace = _slopes(grad, estimate, ctx.alpha, scale)
        left, right = _symmetric_factors(estimate, of_power)
        with torch.autocast(gram.device.type, enabled=False):
            gradient = left @ right.mT
        gradient += gram * (of_power * estimate.slope * scale).to(gradient.dtype)[..., None, None]
        diagonal = of_power * estimate.constant + of_trace
        gradient.diagonal(dim1=-2, dim2=-1).add_(diagonal[..., None])
        return gradient.to(gram.dtype), None, None


class _OfSamples(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        alpha: float,
        options: Lanczos,
        evaluate: Sequence[Callable[[Tensor, Tensor], Tensor]],
        progress: Progress | None,
        trace: Tensor,
        *ends: Tensor,
    ) -> tuple[Tensor, Tensor]:
        matrices, everything = assemble(evaluate, ends), range(len(evaluate))
        scale = _reciprocal(trace)
        squared_norm = torch.zeros_like(trace)

        def product(vectors: Tensor) -> Tensor:
            image, norm = torch.zeros_like(vectors), torch.zeros_like(trace)
            for i, j, entries in each_tile(matrices, progress):
                tile = joint(entries, everything)
                image[..., i, :] += tile @ vectors[..., j, :]
                if i != j:
                    image[..., j, :] += tile.mT @ vectors[..., i, :]
                norm += (1 if i == j else 2) * tile.square().sum(dim=(-2, -1))
            squared_norm.copy_(norm * scale * scale)
            return image * scale[..., None, None]

        estimate = power_trace(product, squared_norm, alpha, ends[0], options)
        ctx.alpha, ctx.evaluate, ctx.progress = alpha, evaluate, progress
        ctx.save_for_backward(scale, *estimate, *ends)
        bits, error = _in_bits(estimate, alpha, trace)
        ctx.mark_non_differentiable(error)
        return bits, error

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        count = len(PowerTrace._fields)
        scale, *saved = ctx.saved_tensors
        estimate, ends = PowerTrace(*saved[:count]), saved[count:]
        of_power, of_trace = _slopes(grad, estimate, ctx.alpha, scale)
        left, right = _symmetric_factors(estimate, of_power)
        slope = (of_power * estimate.slope * scale)[..., None, None]
        constant = (of_power * estimate.constant)[..., None]
        everything = range(len(ctx.evaluate))

        def of_entries(entries: list[Tensor], i: slice, j: slice, v: list[int]) -> list[Tensor]:
            of_tile = left[..., i, :] @ right[..., j, :].mT + slope * joint(entries, everything)
            if i == j:
                of_tile.diagonal(dim1=-2, dim2=-1).add_(constant)
            else:
                of_tile *= 2
            others = [[u for u in everything if u != w] for w in v]
            return [joint([*entries, of_tile], [*of, len(entries)]) for of in others]

        matrices = assemble(ctx.evaluate, ends)
        gradients = pull_back(matrices, of_entries, ctx.needs_input_grad[5:], ctx.progress)
        return None, None, None, None, of_trace, *gradients


def _reciprocal(trace: Tensor) -> Tensor:
    return 1 / torch.where(trace == 0, 1.0, trace)


def _in_bits(estimate: PowerTrace, alpha: float, trace: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and its error; a zero matrix has entropy 0."""
    zero = (trace == 0) & (estimate.value == 0)
    bits = torch.where(zero, 1.0, estimate.value).log2() / (1 - alpha)
    error = torch.where(zero, 0.0, estimate.error / estimate.value) / ((alpha - 1) * math.log(2))
    return bits, error


def _slopes(
    grad: Tensor, estimate: PowerTrace, alpha: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of tr K^alpha / (tr K)^alpha through the power, over tr K, and through tr K."""
    of_log = grad / ((1 - alpha) * math.log(2))
    of_power = torch.where(estimate.value == 0, 0.0, of_log * scale / estimate.value)
    of_trace = torch.where(estimate.value == 0, 0.0, -alpha * of_log * scale)
    return of_power, of_trace


def _symmetric_factors(estimate: PowerTrace, of_power: Tensor) -> tuple[Tensor, Tensor]:
    """The low-rank part of the gradient, as a product of factors of twice the rank."""
    half = (of_power / 2).to(estimate.left.dtype)[..., None, None]
    left = torch.cat([estimate.left, estimate.right], dim=-1) * half
    return left, torch.cat([estimate.right, estimate.left], dim=-1)
