"""The InfoSAM loss as a function of relations and features (Eq. 10-14)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from renyi_kd._checks import (
    check_alpha,
    check_flag,
    check_floating,
    check_real,
    check_same_device,
)
from renyi_kd._precision import compute_dtype, exact_dtype
from renyi_kd.information.kernels import inner_products
from renyi_kd.information.routes.choice import trace_one_entropy
from renyi_kd.infosam.features import EVALUATED
from renyi_kd.infosam.operators.batch_gram import batch_gram, batch_gram_error
from renyi_kd.infosam.operators.joint import joint_grams
from renyi_kd.infosam.processes import (
    TellingRanks,
    check_group,
    mean_over_ranks,
    slices_over_ranks,
    sum_over_ranks,
)


class InfoSAMTerms(NamedTuple):
    """The loss, its terms, and what to watch; all scalars, information in bits.

    The first three carry gradients, the others are detached.

    Example:
        >>> import torch
        >>> from renyi_kd import infosam_terms
        >>> relation, embedding, tokens = torch.eye(4), torch.ones(4, 9), torch.ones(4, 3)
        >>> terms = infosam_terms(relation, relation, embedding, tokens)
        >>> f"{terms.loss:.1f} = {terms.compression:.1f} + 0.5 * {terms.distillation:.1f}"
        '-1.0 = 0.0 + 0.5 * -2.0'
    """

    loss: Tensor
    """Eq. 14: compression_weight * compression + distillation_weight * distillation."""
    compression: Tensor
    """L_r, Eq. 10 without its constant S(G_i, G_m): S(G_r^T) - S(G_i, G_m, G_r^T)."""
    distillation: Tensor
    """L_d, Eq. 12: -I(r^T; r^S)."""
    compressed_information: Tensor
    """I(z_i, z_m; r), what the teacher's relation keeps of its features."""
    distilled_information: Tensor
    """I(r^T; r^S), what the student's relation shares with the teacher's."""
    teacher_relation_entropy: Tensor
    """S(G_r^T). If it falls towards 0, the relation has collapsed."""
    student_relation_entropy: Tensor
    """S(G_r^S)."""
    teacher_feature_entropy: Tensor
    """S(G_i, G_m)."""
    relation_cosine: Tensor
    """The mean over samples of cos(r^T_b, r^S_b); NaN if the relations differ in shape."""


def infosam_terms(
    teacher_relation: Tensor,
    student_relation: Tensor,
    image_embedding: Tensor,
    mask_tokens: Tensor,
    *,
    alpha: float = 2.0,
    compression_weight: float = 1.0,
    distillation_weight: float = 0.5,
    distillation_trains_relation: bool = True,
    process_group: "dist.ProcessGroup | None" = None,
) -> InfoSAMTerms:
    r"""Compute the InfoSAM loss and its terms from relations and teacher features (Eq. 10-14).

    .. math::
        L_r &= S_\alpha(G_r^T) - S_\alpha(G_i^T, G_m^T, G_r^T) && \text{(Eq. 10, 11)} \\
        L_d &= -S_\alpha(G_r^T) - S_\alpha(G_r^S) + S_\alpha(G_r^T, G_r^S) && \text{(Eq. 12, 13)} \\
        L &= \lambda_1 L_r + \lambda_2 L_d && \text{(Eq. 14)}

    Each :math:`G` is the B x B Gram matrix over the samples of the batch, of the linear kernel on
    flattened samples, normalised as in Def. 1.

    Args:
        teacher_relation: :math:`r^T`, shape `(B, ...)`.
        student_relation: :math:`r^S`, shape `(B, ...)`.
        image_embedding: :math:`z_i^T` of the teacher, shape `(B, ...)`. Detach it, unless the
            compression term is to train it.
        mask_tokens: :math:`z_m^T` of the teacher, shape `(B, ...)`. Detach them likewise.
        alpha: Rényi order > 0, `math.inf` included.
        compression_weight: :math:`\lambda_1` >= 0.
        distillation_weight: :math:`\lambda_2` >= 0.
        distillation_trains_relation: whether :math:`L_d` passes a gradient to `teacher_relation`.
        process_group: take the samples of all its ranks, see `InfoSAMDistiller`.

    Returns:
        `InfoSAMTerms`, in the promoted dtype of the arguments, at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or an option not a number.
        ValueError: fewer than two samples, different batch sizes or devices, `alpha` <= 0, a
            negative weight, or samples of another kind on another rank.

    References:
        Y. Zhang et al., InfoSAM: Fine-Tuning the Segment Anything Model from An
        Information-Theoretic Perspective, ICML 2025.

    Example:
        >>> import torch
        >>> from renyi_kd import infosam_terms
        >>> relation, embedding, tokens = torch.eye(4), torch.ones(4, 9), torch.ones(4, 3)
        >>> infosam_terms(relation, relation, embedding, tokens).distilled_information
        tensor(2.)
    """
    samples = teacher_relation, student_relation, image_embedding, mask_tokens
    losses, entropies = infosam_losses(
        *samples,
        alpha=alpha,
        compression_weight=check_real("compression_weight", compression_weight, minimum=0),
        distillation_weight=check_real("distillation_weight", distillation_weight, minimum=0),
        distillation_trains_relation=distillation_trains_relation,
        process_group=process_group,
    )
    _, compression, distillation = losses
    teacher_entropy, student_entropy, feature_entropy, *_ = entropies
    figures = torch.stack(
        [
            feature_entropy + compression,
            -distillation,
            teacher_entropy,
            student_entropy,
            feature_entropy,
            # On the device of the other figures, which may be the CPU.
            _mean_cosine(teacher_relation, student_relation, process_group).to(compression),
        ]
    ).detach()
    dtype, device = compute_dtype(*samples), teacher_relation.device
    in_dtype = (loss.to(dtype).to(device) for loss in losses)
    return InfoSAMTerms(*in_dtype, *figures.to(dtype).to(device).unbind())


def infosam_losses(
    teacher_relation: Tensor,
    student_relation: Tensor,
    image_embedding: Tensor,
    mask_tokens: Tensor,
    *,
    alpha: float,
    compression_weight: float,
    distillation_weight: float,
    distillation_trains_relation: bool,
    process_group: "dist.ProcessGroup | None",
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Compute what `infosam_terms` does, but for the figures that only a log needs.

    Returns:
        The loss, compression and distillation; and the entropies of the five matrices of
        `joint_grams`. All are scalars in float64.
    """
    samples = {
        "teacher_relation": teacher_relation,
        "student_relation": student_relation,
        "image_embedding": image_embedding,
        "mask_tokens": mask_tokens,
    }
    check_group(process_group)
    with TellingRanks(process_group):
        # A rank may have no sample, if the others have two.
        check_batches(samples, at_least=2 if process_group is None else 0)
        alpha = check_alpha(alpha)
        check_flag("distillation_trains_relation", distillation_trains_relation)
    if process_group is not None:
        options = alpha, compression_weight, distillation_weight, distillation_trains_relation
        samples = slices_over_ranks(samples, options, process_group)
        check_batches(samples, at_least=2)
    grams = torch.stack(
        [
            # Of few features, plain operators cost a CPU less.
            inner_products(x.flatten(1))
            if x.is_cpu and name != "image_embedding"
            else batch_gram(x)
            for name, x in samples.items()
        ]
    )
    if process_group is not None:
        grams = sum_over_ranks(grams, process_group)
    # A joint entropy is the entropy of a Hadamard product (Eq. 16). All five are one stacked call.
    entropies = trace_one_entropy(
        joint_grams(grams, distillation_trains_relation),
        alpha,
        epsilon=batch_gram_error(image_embedding),
    ).unbind()
    teacher, student, _, compressed, distilled = entropies

    compression = teacher - compressed
    if not distillation_trains_relation:
        teacher = teacher.detach()
    distillation = distilled - teacher - student
    loss = compression_weight * compression + distillation_weight * distillation
    return (loss, compression, distillation), entropies


def check_batches(samples: dict[str, Tensor], at_least: int) -> None:
    """Raise unless all tensors are batches of the same number of samples, `at_least` so many."""
    for name, tensor in samples.items():
        check_floating(name, tensor)
        if tensor.ndim < 2:
            raise ValueError(
                f"`{name}` must have shape (B, ...), one sample a row, got {tuple(tensor.shape)}."
            )
    check_same_device(**samples)
    sizes = [tensor.shape[0] for tensor in samples.values()]
    if any(size != sizes[0] for size in sizes):
        found = ", ".join(f"`{name}` {size}" for name, size in zip(samples, sizes, strict=True))
        hint = f" {EVALUATED}" if samples.keys() == {"teacher", "student"} else ""
        raise ValueError(f"All arguments must have the same batch size, got {found}.{hint}")
    if sizes[0] < at_least:
        raise ValueError(
            f"A batch must hold at least {at_least} sample{'s' * (at_least > 1)}, got {sizes[0]}: "
            f"a Gram matrix over one sample carries no information. Use a larger batch, "
            f"drop_last=True in the data loader for the last one, or process_group=... for the "
            f"samples of all processes. Gradient accumulation does not enlarge the Gram matrix."
        )


def _mean_cosine(
    teacher_relation: Tensor,
    student_relation: Tensor,
    process_group: "dist.ProcessGroup | None",
) -> Tensor:
    if teacher_relation.shape != student_relation.shape:
        dtype = exact_dtype(teacher_relation.device)
        return torch.full((), torch.nan, dtype=dtype, device=teacher_relation.device)
    teacher, student = teacher_relation.detach().flatten(1), student_relation.detach().flatten(1)
    dtype = exact_dtype(teacher.device)
    cosines = torch.cosine_similarity(teacher.to(dtype), student.to(dtype))
    return cosines.mean() if process_group is None else mean_over_ranks(cosines, process_group)
