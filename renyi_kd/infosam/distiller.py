"""The InfoSAM loss as a module that holds the relation of teacher and student (Eq. 14)."""

from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from renyi_kd._checks import check_alpha, check_flag, check_integer, check_real
from renyi_kd._precision import compute_dtype
from renyi_kd.infosam.features import Features
from renyi_kd.infosam.processes import (
    GroupReference,
    TellingRanks,
    averaging_gradients,
    broadcast,
    check_group,
)
from renyi_kd.infosam.relation import RelationModule, flatten_features
from renyi_kd.infosam.terms import InfoSAMTerms, check_batches, infosam_losses, infosam_terms

FeaturePair: TypeAlias = Features | tuple[Tensor, Tensor]


class InfoSAMDistiller(nn.Module):
    r"""The InfoSAM distillation loss (Zhang et al., ICML 2025, Eq. 14), see `infosam_terms`.

    It holds the relation module that teacher and student share: give its parameters to the
    optimiser. Teacher features are detached. Compression trains the relation module only.
    Distillation trains the student and, unless told otherwise, the relation module.

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
        The loss may drive the relations of all samples to be the same. Then nothing is distilled,
        and `teacher_relation_entropy` of `terms` is near zero. It is compression that does so.

    Note:
        At alpha 2 and other integers up to 32, nothing waits for a CUDA device. With Triton 3.3 or
        newer, nothing does at any order, for up to 32 samples. Nothing of a map's size is kept for
        backward. There is no second derivative backwards, but by `torch.func.hessian` there is.
        Features that are not finite give a loss and gradients that are not finite.

    Note:
        A `process_group`, such as `torch.distributed.group.WORLD` after `init_process_group`, makes
        the loss that of one batch with the samples of all ranks. It is the same on all of them.
        Their numbers of samples may differ, and one a rank is enough.

        The student's gradients are as DistributedDataParallel expects them, which averages over the
        ranks. Those of the relation module are averaged here, in every backward pass, so do not
        wrap the distiller. The loss has to have the same factor on all ranks.

        The ranks have to make the distiller, call it and pass back together. When it is made, all
        take over the parameters of the first rank. Features of other shapes, or other options, on
        one rank are a `ValueError` on all. If a rank dies or stays away, the others raise an error,
        after the timeout of the group at the latest.

        In every step the ranks tell each other their numbers of samples. After
        `init_process_group()` without an argument they do so by gloo, and the CPU does not wait for
        the GPU. With a group that has NCCL alone, it waits.

    Example:
        >>> import torch
        >>> from renyi_kd import InfoSAMDistiller
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
        self.dim = check_integer("dim", dim, minimum=1)
        self.alpha = check_alpha(alpha)
        self.compression_weight = check_real("compression_weight", compression_weight, minimum=0)
        self.distillation_weight = check_real("distillation_weight", distillation_weight, minimum=0)
        if relation is not None and not isinstance(relation, nn.Module):
            raise TypeError(f"`relation` must be a torch.nn.Module, got {type(relation).__name__}.")
        self.relation = RelationModule(dim) if relation is None else relation
        self.distillation_trains_relation = check_flag(
            "distillation_trains_relation", distillation_trains_relation
        )
        self.process_group = process_group

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        """The group over whose samples the Gram matrices are; None: those of this process."""
        if self._process_group is None:
            return None
        group = self._process_group()
        if group is None:
            raise RuntimeError(
                "The process group of the distiller has been destroyed, or the distiller comes "
                "from a file, which holds none. Set distiller.process_group to a group, or to None "
                "for the samples of this process alone."
            )
        return group

    @process_group.setter
    def process_group(self, process_group: "dist.ProcessGroup | None") -> None:
        check_group(process_group)
        self._process_group = None if process_group is None else GroupReference(process_group)
        if process_group is not None:
            broadcast(self.relation, process_group)

    def forward(self, teacher: FeaturePair, student: FeaturePair) -> Tensor:
        """Compute the loss, a scalar; see `terms`."""
        if self.process_group is not None:
            # The call makes the same collectives as `terms`, so that one rank may log all terms
            # while the others only take the loss.
            return self.terms(teacher, student).loss
        samples = self._relations_and_features(teacher, student)
        (loss, *_), _ = infosam_losses(*samples, **self._options())
        return loss.to(compute_dtype(*samples)).to(samples[0].device)

    def terms(self, teacher: FeaturePair, student: FeaturePair) -> InfoSAMTerms:
        """Compute the loss, its terms and what to watch.

        Args:
            teacher: features of the frozen pre-trained model.
            student: features of the fine-tuned model, from the same images and prompts.

        Raises:
            TypeError: features that are not pairs of floating-point tensors.
            ValueError: shapes, batch sizes or devices do not fit, fewer than two samples, or the
                teacher requires a gradient while the student does not.
        """
        with TellingRanks(self.process_group):
            samples = self._relations_and_features(teacher, student)
        return infosam_terms(*samples, **self._options())

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return (
            f"dim={self.dim}, alpha={self.alpha}, compression_weight={self.compression_weight}, "
            f"distillation_weight={self.distillation_weight}, "
            f"distillation_trains_relation={self.distillation_trains_relation}"
            + ("" if self._process_group is None else f", process_group={self._process_group()}")
        )

    def _relations_and_features(
        self, teacher: FeaturePair, student: FeaturePair
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both relations, and the teacher's features without gradient."""
        teacher_pixels, teacher_tokens = self._flatten("teacher", teacher)
        student_pixels, student_tokens = self._flatten("student", student)
        if _requires_grad(teacher) and not _requires_grad(student):
            raise ValueError(
                "`teacher` must not be what trains, but it requires a gradient and `student` does "
                "not. The arguments are probably swapped: call distiller(teacher, student)."
            )
        # The batch is checked before the relations are computed, so that a bad one costs nothing.
        at_least = 2 if self.process_group is None else 0
        check_batches({"teacher": teacher_pixels, "student": student_pixels}, at_least)

        teacher_pixels, teacher_tokens = teacher_pixels.detach(), teacher_tokens.detach()
        parameters = {}
        if self.process_group is not None:
            parameters = averaging_gradients(self.relation, self.process_group)
        teacher_relation = self._relate(teacher_pixels, teacher_tokens, parameters)
        if not self.distillation_trains_relation:
            parameters = {name: p.detach() for name, p in self.relation.named_parameters()}
        student_relation = self._relate(student_pixels, student_tokens, parameters)
        return teacher_relation, student_relation, teacher_pixels, teacher_tokens

    def _relate(self, pixels: Tensor, tokens: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the relation, with these parameters in place of the module's."""
        if not parameters:
            relation: Tensor = self.relation(pixels, tokens)
        else:
            relation = functional_call(self.relation, parameters, (pixels, tokens))
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


def _requires_grad(features: FeaturePair) -> bool:
    return any(tensor.requires_grad for tensor in features)
