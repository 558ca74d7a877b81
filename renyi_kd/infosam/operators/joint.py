r"""The five trace-one Gram matrices of the InfoSAM loss from the four raw ones (Eq. 10 to 13)."""

from typing import Any

import torch
from torch import Tensor


def joint_grams(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    r"""Normalised Gram matrices and their Hadamard products, each of trace one.

    Normalised as in Def. 1 a Gram matrix has the diagonal 1 / B, and so has B times the Hadamard
    product of two: no joint matrix has a trace to divide by.

    Args:
        grams: raw Gram matrices of :math:`r^T, r^S, z_i, z_m`, shape `(4, B, B)`, float64.
        distillation_trains_relation: whether :math:`G_r^T` in the product with :math:`G_r^S` passes
            a gradient.

    Returns:
        :math:`G_r^T, G_r^S, G_i \circ G_m, G_i \circ G_m \circ G_r^T, G_r^T \circ G_r^S`, of trace
        one, shape `(5, B, B)`. They have no second derivative.
    """
    joint: Tensor = op(grams, distillation_trains_relation)
    return joint


def joint_by_operators(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    """As `joint_grams`, one PyTorch operator after the other."""
    scale, zero_pairs = _scale(grams)
    t, s, i, m = _cosines(grams, scale, zero_pairs).unbind()
    im = i * m
    return torch.stack([t, s, im, im * t, t * s]) / grams.shape[-1]


def gradient_by_operators(
    grad: Tensor, grams: Tensor, distillation_trains_relation: bool
) -> Tensor:
    """Gradient of `grams`."""
    scale, zero_pairs = _scale(grams)
    cosines = _cosines(grams, scale, zero_pairs)
    t, s, i, m = cosines.unbind()
    of_t, of_s, of_im, of_imt, of_ts = grad.unbind()
    of_im = of_im + of_imt * t
    of_t = of_t + of_imt * (i * m)
    of_s = of_s + of_ts * t
    if distillation_trains_relation:
        of_t = of_t + of_ts * s
    of_cosines = torch.stack([of_t, of_s, of_im * m, of_im * i]) / grams.shape[-1]

    of_grams = of_cosines * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # cos_ij = K_ij / sqrt(K_ii K_jj) falls with K_ii and K_jj.
    felt = of_cosines * cosines
    of_diagonal = (felt.sum(dim=-1) + felt.sum(dim=-2)) * scale.square() / -2
    of_grams.diagonal(dim1=-2, dim2=-1).add_(of_diagonal)
    return of_grams


def _scale(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Reciprocal norms of the samples, 0 for a zero sample, and which pairs are of zero samples."""
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    zero = diagonal == 0
    scale = diagonal.rsqrt().masked_fill_(zero, 0.0)
    return scale, zero.unsqueeze(-1) & zero.unsqueeze(-2)


def _cosines(grams: Tensor, scale: Tensor, zero_pairs: Tensor) -> Tensor:
    # Zero samples count as equal to each other and orthogonal to the rest; a NaN stays one.
    return (grams * scale.unsqueeze(-1) * scale.unsqueeze(-2)).add_(zero_pairs)


op = torch.library.custom_op("renyi_kd::joint_grams", joint_by_operators, mutates_args=())
backward_op = torch.library.custom_op(
    "renyi_kd::joint_grams_backward", gradient_by_operators, mutates_args=()
)


@op.register_fake
def _(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    return grams.new_empty(5, *grams.shape[1:])


@backward_op.register_fake
def _(grad: Tensor, grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    return torch.empty_like(grams)


def _save_grams(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    grams, ctx.distillation_trains_relation = inputs
    ctx.save_for_backward(grams)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return backward_op(grad, *ctx.saved_tensors, ctx.distillation_trains_relation), None


op.register_autograd(_backward, setup_context=_save_grams)
