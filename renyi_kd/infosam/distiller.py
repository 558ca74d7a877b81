"""The InfoSAM loss: compress the teacher's relation, carry it to the student (Eq. 10-14)."""

from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from renyi_kd._checks import (
    check_alpha,
    check_floating,
    check_integer,
    check_real,
    check_same_device,
)
from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import gram_error, inner_products, sample_gram
from renyi_kd.information.routes.eigenvalues import choose_method, spectral_entropy
from renyi_kd.infosam.features import Features
from renyi_kd.infosam.operators.joint import joint_grams
from renyi_kd.infosam.processes import (
    averaging_gradients,
    broadcast,
    check_group,
    mean_over_ranks,
    slices_over_ranks,
    sum_over_ranks,
)
from renyi_kd.infosam.relation import RelationModule, flatten_features

FeaturePair: TypeAlias = Features | tuple[Tensor, Tensor]


class InfoSAMTerms(NamedTuple):
    """The loss, its terms, and what to watch; all scalars, information in bits.

    The first three carry gradients, the others are detached.

    Example:
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
    """S(G_r^T); falling towards 0 it tells of a collapsed relation."""
    student_relation_entropy: Tensor
    """S(G_r^S)."""
    teacher_feature_entropy: Tensor
    """S(G_i, G_m)."""
    relation_cosine: Tensor
    """Mean over samples of cos(r^T_b, r^S_b); NaN if the relations differ in shape."""


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
    r"""The InfoSAM loss and its terms from relations and teacher features (Eq. 10-14).

    .. math::
        L_r &= S_\alpha(G_r^T) - S_\alpha(G_i^T, G_m^T, G_r^T) && \text{(Eq. 10, 11)} \\
        L_d &= -S_\alpha(G_r^T) - S_\alpha(G_r^S) + S_\alpha(G_r^T, G_r^S) && \text{(Eq. 12, 13)} \\
        L &= \lambda_1 L_r + \lambda_2 L_d && \text{(Eq. 14)}

    where each :math:`G` is the B x B Gram matrix over the samples of the batch, linear kernel on
    flattened samples, normalised as in Def. 1.

    Args:
        teacher_relation: :math:`r^T`, shape `(B, ...)`.
        student_relation: :math:`r^S`, shape `(B, ...)`.
        image_embedding: :math:`z_i^T` of the teacher, detached, shape `(B, ...)`.
        mask_tokens: :math:`z_m^T` of the teacher, detached, shape `(B, ...)`.
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
        >>> relation, embedding, tokens = torch.eye(4), torch.ones(4, 9), torch.ones(4, 3)
        >>> infosam_terms(relation, relation, embedding, tokens).distilled_information
        tensor(2.)
    """
    samples = teacher_relation, student_relation, image_embedding, mask_tokens
    losses, entropies = _losses(
        *samples,
        alpha=alpha,
        compression_weight=check_real("compression_weight", compression_weight, minimum=0),
        distillation_weight=check_real("distillation_weight", distillation_weight, minimum=0),
        distillation_trains_relation=distillation_trains_relation,
        process_group=process_group,
    )
    _, compression, distillation = losses
    entropy_t, entropy_s, entropy_im, *_ = entropies
    figures = torch.stack(
        [
            entropy_im + compression,
            -distillation,
            entropy_t,
            entropy_s,
            entropy_im,
            _mean_cosine(teacher_relation, student_relation, process_group),
        ]
    ).detach()
    dtype = compute_dtype(*samples)
    return InfoSAMTerms(*(loss.to(dtype) for loss in losses), *figures.to(dtype).unbind())


def _losses(
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
    """L, L_r and L_d, and the entropies of the five matrices of `joint_grams`, in float64."""
    samples = {
        "teacher_relation": teacher_relation,
        "student_relation": student_relation,
        "image_embedding": image_embedding,
        "mask_tokens": mask_tokens,
    }
    check_group(process_group)
    _check_samples(samples, at_least=2 if process_group is None else 1)
    alpha = check_alpha(alpha)
    if process_group is not None:
        options = alpha, compression_weight, distillation_weight, distillation_trains_relation
        samples = slices_over_ranks(samples, options, process_group)
        _check_samples(samples, at_least=2)
    grams = torch.stack(
        [
            sample_gram(x) if name == "image_embedding" else inner_products(x.flatten(1))
            for name, x in samples.items()
        ]
    )
    if process_group is not None:
        grams = sum_over_ranks(grams, process_group)
    # A joint entropy is the entropy of a Hadamard product (Eq. 16).
    entropies = spectral_entropy(
        joint_grams(grams, distillation_trains_relation),
        alpha,
        choose_method(alpha, None),
        epsilon=gram_error(image_embedding),
    ).unbind()
    entropy_t, entropy_s, _, entropy_imt, entropy_ts = entropies
    distilled_entropy_t = entropy_t if distillation_trains_relation else entropy_t.detach()

    compression = entropy_t - entropy_imt
    distillation = entropy_ts - distilled_entropy_t - entropy_s
    loss = compression_weight * compression + distillation_weight * distillation
    return (loss, compression, distillation), entropies


class InfoSAMDistiller(nn.Module):
    r"""The InfoSAM distillation loss (Zhang et al., ICML 2025, Eq. 14), see `infosam_terms`.

    It holds the relation module that teacher and student share: give its parameters to the
    optimiser. Teacher features are detached. Compression trains the relation module only;
    distillation trains the student and, unless told otherwise, the relation module.

    Args:
        dim: number of channels :math:`D` of image embedding and mask tokens.
        alpha: Rényi order > 0, `math.inf` included.
        compression_weight: :math:`\lambda_1` >= 0.
        distillation_weight: :math:`\lambda_2` >= 0.
        relation: module from image embedding `(B, P, D)` and mask tokens `(B, N, D)` to relations
            `(B, ...)`. Default: `RelationModule(dim)`.
        distillation_trains_relation: if False, both relations of the distillation term are computed
            with detached parameters, so that it trains the student alone (Eq. 6).
        process_group: take the Gram matrices over the samples of all its ranks, see below. Default:
            over those of this process.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: `dim` < 1, `alpha` <= 0, a negative weight, or a group without this process.

    Shape:
        - teacher, student: `Features`, or any pair of an image embedding `(B, D, H, W)`,
          `(B, H, W, D)` or `(B, P, D)` and mask tokens `(B, N, D)` or `(B, D)`. `H`, `W` and `N`
          may differ between the two.
        - output: scalar, in the promoted dtype of features and parameters, at least float32.

    Note:
        At alpha 2 and other integers up to 32, and with Triton >= 3.3 at every order up to 32
        samples, nothing waits for a CUDA device. Nothing of a map's size is kept for backward.
        There is no second derivative. Non-finite features give a non-finite loss and gradients.

    Note:
        With a `process_group`, such as `torch.distributed.group.WORLD` after
        `init_process_group`, the loss is the same on all ranks, that of one batch with the samples
        of all; their numbers may differ, and one a rank is enough. The student's gradients are as
        DistributedDataParallel expects them, which averages over the ranks. Those of the relation
        module are averaged here, in every backward pass: do not wrap the distiller. The ranks have
        to make it, call it and pass back together; making it, they take over the parameters of
        the first. The loss has to have the same factor on all ranks. Features of other shapes, or
        other options, on one rank are a `ValueError` on all. If a rank dies or stays away, the
        others raise an error after the timeout of the group at the latest. Every step the ranks
        tell each other their numbers of samples; if the group has NCCL alone, the CPU waits for the
        GPU then, and does not if it has gloo as well, as from `init_process_group()` without an
        argument.

    Example:
        >>> distiller = InfoSAMDistiller(dim=8)
        >>> teacher = torch.randn(4, 8, 6, 6), torch.randn(4, 1, 8)
        >>> student = torch.randn(4, 8, 6, 6, requires_grad=True), torch.randn(4, 1, 8)
        >>> loss = distiller(teacher, student)
        >>> loss.backward()
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        alpha: float = 2.0,
        compression_weight: float = 1.0,
        distillation_weight: float = 0.5,
        relation: nn.Module | None = None,
        distillation_trains_relation: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        check_group(process_group)
        self.dim = check_integer("dim", dim, minimum=1)
        self.alpha = check_alpha(alpha)
        self.compression_weight = check_real("compression_weight", compression_weight, minimum=0)
        self.distillation_weight = check_real("distillation_weight", distillation_weight, minimum=0)
        if relation is not None and not isinstance(relation, nn.Module):
            raise TypeError(f"`relation` must be a torch.nn.Module, got {type(relation).__name__}.")
        self.relation = RelationModule(dim) if relation is None else relation
        self.distillation_trains_relation = distillation_trains_relation
        self._process_group = None if process_group is None else ref(process_group)
        if process_group is not None:
            broadcast(self.relation, process_group)

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        """Whose samples the Gram matrices are over; None: those of this process."""
        if self._process_group is None:
            return None
        group = self._process_group()
        if group is None:
            raise RuntimeError("The process group of the distiller has been destroyed.")
        return group

    def forward(self, teacher: FeaturePair, student: FeaturePair) -> Tensor:
        """The loss, a scalar; see `terms`."""
        if self.process_group is not None:
            # The same collectives, should one rank call for all terms and another for the loss.
            return self.terms(teacher, student).loss
        samples = self._samples(teacher, student)
        (loss, *_), _ = _losses(*samples, **self._options())
        return loss.to(compute_dtype(*samples))

    def terms(self, teacher: FeaturePair, student: FeaturePair) -> InfoSAMTerms:
        """The loss, its terms and what to watch.

        Args:
            teacher: features of the frozen pre-trained model.
            student: features of the fine-tuned model, from the same images and prompts.

        Raises:
            TypeError: features that are not pairs of floating-point tensors.
            ValueError: shapes, batch sizes or devices do not fit, fewer than two samples, or the
                teacher requires a gradient while the student does not.
        """
        return infosam_terms(*self._samples(teacher, student), **self._options())

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"dim={self.dim}, alpha={self.alpha}, compression_weight={self.compression_weight}, "
            f"distillation_weight={self.distillation_weight}, "
            f"distillation_trains_relation={self.distillation_trains_relation}"
            + ("" if self._process_group is None else f", process_group={self._process_group()}")
        )

    def _samples(
        self, teacher: FeaturePair, student: FeaturePair
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both relations, and the teacher's features without gradient."""
        teacher_pixels, teacher_tokens = self._flatten("teacher", teacher)
        student_pixels, student_tokens = self._flatten("student", student)
        if _requires_grad(teacher) and not _requires_grad(student):
            raise ValueError(
                "`teacher` must not be what trains, but it requires a gradient and `student` does "
                "not. The arguments are probably swapped: call distiller(teacher, student)."
            )
        # Before the relations are computed, so that a bad batch costs nothing.
        at_least = 2 if self.process_group is None else 1
        _check_samples({"teacher": teacher_pixels, "student": student_pixels}, at_least)

        teacher_pixels, teacher_tokens = teacher_pixels.detach(), teacher_tokens.detach()
        weights = {}
        if self.process_group is not None:
            weights = averaging_gradients(self.relation, self.process_group)
        teacher_relation = self._relate(teacher_pixels, teacher_tokens, weights)
        if not self.distillation_trains_relation:
            weights = {name: p.detach() for name, p in self.relation.named_parameters()}
        student_relation = self._relate(student_pixels, student_tokens, weights)
        return teacher_relation, student_relation, teacher_pixels, teacher_tokens

    def _relate(self, pixels: Tensor, tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The relation, with these parameters in place of the module's."""
        if not weights:
            relation: Tensor = self.relation(pixels, tokens)
        else:
            relation = functional_call(self.relation, weights, (pixels, tokens))
        return relation

    def _options(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "compression_weight": self.compression_weight,
            "distillation_weight": self.distillation_weight,
            "distillation_trains_relation": self.distillation_trains_relation,
            "process_group": self.process_group,
        }

    def _flatten(self, name: str, features: FeaturePair) -> tuple[Tensor, Tensor]:
        if not isinstance(features, (tuple, list)) or len(features) != 2:
            raise TypeError(
                f"`{name}` must be Features or a pair (image_embedding, mask_tokens), "
                f"got {type(features).__name__}."
            )
        image_embedding, mask_tokens = features
        return flatten_features(image_embedding, mask_tokens, self.dim, owner=f"{name} ")


def _check_samples(samples: dict[str, Tensor], at_least: int) -> None:
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
        raise ValueError(f"All arguments must have the same batch size, got {found}.")
    if sizes[0] < at_least:
        raise ValueError(
            f"A batch must hold at least {at_least} sample{'s' * (at_least > 1)}, got {sizes[0]}: "
            f"a Gram matrix over one sample carries no information. Use a larger batch, "
            f"drop_last=True in the data loader for the last one, or process_group=... for the "
            f"samples of all processes. Gradient accumulation does not enlarge the Gram matrix."
        )


def _requires_grad(features: FeaturePair) -> bool:
    return any(tensor.requires_grad for tensor in features)


def _mean_cosine(
    teacher_relation: Tensor,
    student_relation: Tensor,
    process_group: "dist.ProcessGroup | None",
) -> Tensor:
    if teacher_relation.shape != student_relation.shape:
        return torch.full((), torch.nan, dtype=torch.float64, device=teacher_relation.device)
    teacher, student = teacher_relation.detach().flatten(1), student_relation.detach().flatten(1)
    cosines = torch.cosine_similarity(teacher.double(), student.double())
    return cosines.mean() if process_group is None else mean_over_ranks(cosines, process_group)
