"""TinySAM, full stage: embedding, tokens and masks are equal (Shu et al., 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parts.distillers.base import EMBEDDING, LOGITS, TOKENS, Distiller, Pass

EPS = 1e-6


class TinySAM(Distiller):
    """The absolute distances of embedding, tokens and masks, the latter weighted by hardness."""

    needs = (EMBEDDING, TOKENS, LOGITS)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        of_embedding = F.l1_loss(student.embedding, teacher.embedding)
        of_tokens = F.l1_loss(student.tokens, teacher.tokens)
        return of_embedding + of_tokens + hard_masks(student.logits, teacher.logits, masks)


def hard_masks(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Return the sum over masks of their distances, each weighted by its `hardness`."""
    size = student.shape[-2:]
    if masks.shape[-2:] != size:
        masks = F.interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0.5
    distances = (student - teacher).abs().mean((1, 2))
    return (hardness(student, teacher, masks) * distances).sum()


@torch.no_grad()
def hardness(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Return weights between 0 and 1, above 1/2 where the teacher's mask is the better one."""
    of_student, of_teacher = (iou(logits > 0, masks).to(logits) for logits in (student, teacher))
    return (of_teacher / (of_student + EPS) - 1).sigmoid()


def iou(found: Tensor, masks: Tensor) -> Tensor:
    """Return the intersection over union of pairs of masks (B, s, s); of empty ones it is 0."""
    union = (found | masks).sum((1, 2)).clamp(min=1)
    return (found & masks).sum((1, 2)).double() / union
