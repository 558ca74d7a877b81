r"""The five Gram matrices of the InfoSAM loss from the four raw ones (Eq. 10 to 13).

The raw ones are those of :math:`r^T, r^S, z_i, z_m`, in this order: the teacher's relation, the
student's, and the image embedding and the mask tokens of the teacher.
"""

from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas


def joint_grams(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    r"""Return the normalised Gram matrices and Hadamard products whose entropies make the loss.

    Normalised as in Def. 1, a Gram matrix has the diagonal 1 / B. So has B times the Hadamard
    product of two of them, and no joint matrix has a trace to divide by.

    Args:
        grams: raw Gram matrices of :math:`r^T, r^S, z_i, z_m`, shape `(4, B, B)`, float64.
        distillation_trains_relation: whether :math:`G_r^T` passes a gradient where it is multiplied
            with :math:`G_r^S`.

    Returns:
        :math:`G_r^T, G_r^S, G_i \circ G_m, G_i \circ G_m \circ G_r^T, G_r^T \circ G_r^S`, each of
        trace one, shape `(5, B, B)`. They have no second derivative.
    """
    if needs_plain_formulas(grams):
        return joint_by_operators(grams, distillation_trains_relation)
    joint: Tensor = joint_operator(grams, distillation_trains_relation)
    return joint


def joint_by_operators(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    """Return what `joint_grams` does, by one PyTorch operator after the other."""
    teacher, student, image, tokens = _cosines(grams, *_inverse_norms(grams)).unbind()
    features = image * tokens
    factor = teacher if distillation_trains_relation else teacher.detach()
    joint = torch.stack([teacher, student, features, features * teacher, factor * student])
    return joint / grams.shape[-1]


def joint_backward_by_operators(
    grad_joint: Tensor, grams: Tensor, distillation_trains_relation: bool
) -> Tensor:
    """Return the gradient of `grams`."""
    inverse_norms, both_are_zero = _inverse_norms(grams)
    cosines = _cosines(grams, inverse_norms, both_are_zero)
    teacher, student, image, tokens = cosines.unbind()
    grad_teacher, grad_student, grad_features, grad_compressed, grad_distilled = grad_joint.unbind()
    grad_features = grad_features + grad_compressed * teacher
    grad_teacher = grad_teacher + grad_compressed * (image * tokens)
    grad_student = grad_student + grad_distilled * teacher
    if distillation_trains_relation:
        grad_teacher = grad_teacher + grad_distilled * student
    grad_cosines = torch.stack(
        [grad_teacher, grad_student, grad_features * tokens, grad_features * image]
    )
    grad_cosines = grad_cosines / grams.shape[-1]

    grad_grams = grad_cosines * inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2)
    # The cosine K_ij / sqrt(K_ii K_jj) also falls with K_ii and with K_jj.
    grad_log_cosines = grad_cosines * cosines
    grad_diagonal = (grad_log_cosines.sum(dim=-1) + grad_log_cosines.sum(dim=-2)) / -2
    grad_diagonal = grad_diagonal * inverse_norms.square()
    grad_grams.diagonal(dim1=-2, dim2=-1).add_(grad_diagonal)
    return grad_grams


def _inverse_norms(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / length of each sample, or 0 of a zero one, and which pairs are of zero ones."""
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    zero = diagonal == 0
    inverse_norms = diagonal.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)
    return inverse_norms, zero.unsqueeze(-1) & zero.unsqueeze(-2)


def _cosines(grams: Tensor, inverse_norms: Tensor, both_are_zero: Tensor) -> Tensor:
    # Zero samples count as equal to each other and orthogonal to the rest. A NaN stays NaN, even
    # when it is multiplied by zero.
    cosines = grams * inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2)
    return cosines + both_are_zero


joint_operator = torch.library.custom_op(
    "renyi_kd::joint_grams", joint_by_operators, mutates_args=()
)
joint_backward_operator = torch.library.custom_op(
    "renyi_kd::joint_grams_backward", joint_backward_by_operators, mutates_args=()
)


@joint_operator.register_fake
def _joint_shape(grams: Tensor, distillation_trains_relation: bool) -> Tensor:
    return grams.new_empty(5, *grams.shape[1:])


@joint_backward_operator.register_fake
def _joint_backward_shape(
    grad_joint: Tensor, grams: Tensor, distillation_trains_relation: bool
) -> Tensor:
    return torch.empty_like(grams)


def _save_grams(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    grams, ctx.distillation_trains_relation = inputs
    ctx.save_for_backward(grams)


def _gradient_of_grams(ctx: Any, grad_joint: Tensor) -> tuple[Tensor, None]:
    gradient = joint_backward_operator(
        grad_joint, *ctx.saved_tensors, ctx.distillation_trains_relation
    )
    return gradient, None


joint_operator.register_autograd(_gradient_of_grams, setup_context=_save_grams)
