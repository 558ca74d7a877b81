"""IBD: masks and where layers attend take after the teacher's (Kuang et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.distillers.base import LAYERS, LOGITS, Distiller, Pass
from parts.distillers.logit import divergence, two_classes

MAPS_WEIGHT = 0.8  # of the maps beside the masks, in the official code


class IBD(Distiller):
    """The divergence of the masks, and the distance of attended layers.

    The original distils from adversarial images as well, which fine-tuning has no place for.

    Args:
        student: Channels of the student's layers.
        teacher: Channels of the teacher's layers.
        width: Channels in which layers are matched.
    """

    needs = (LAYERS, LOGITS)
    least_batch = 2  # of the batch norms

    def __init__(self, student: Sequence[int], teacher: Sequence[int], width: int = 128) -> None:
        super().__init__()
        self.attended = AttendedMaps(student, teacher, width)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        of_masks = divergence(two_classes(student.logits), two_classes(teacher.logits), 1.0)
        return of_masks + MAPS_WEIGHT * self.attended(student.layers, teacher.layers).sum()


class AttendedMaps(nn.Module):
    """For each layer of the teacher, the distance to those of the student that match it."""

    def __init__(self, student: Sequence[int], teacher: Sequence[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.keys = nn.ModuleList(projection(channels, width) for channels in student)
        self.queries = nn.ModuleList(projection(channels, width) for channels in teacher)
        self.for_each_query = projection(width, width * len(teacher))
        self.student_places = nn.Parameter(torch.empty(len(student), width))
        self.teacher_places = nn.Parameter(torch.empty(len(teacher), width))
        nn.init.xavier_normal_(self.student_places)
        nn.init.xavier_normal_(self.teacher_places)

    def attention(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return how well layers match, (B, teacher's, student's); it sums to 1 over the last."""
        batch = len(student[0])
        keys = [
            key(layer.mean((2, 3))).relu() for key, layer in zip(self.keys, student, strict=True)
        ]
        queries = [q(layer.mean((2, 3))) for q, layer in zip(self.queries, teacher, strict=True)]
        each = self.for_each_query(torch.stack(keys, 1).flatten(0, 1))
        each = each.view(batch, len(keys), len(queries), self.width)
        match = torch.einsum("bstq,btq->bts", each, torch.stack(queries, 1))
        match = match + self.teacher_places @ self.student_places.mT
        return (match / self.width**0.5).softmax(-1)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the distance for each layer of the teacher."""
        distances = []
        for layer in teacher:
            size = layer.shape[-2:]
            rows = [energy(other, size) - energy(layer, size) for other in student]
            distances.append(torch.stack([row.square().mean(1) for row in rows], 1))
        weighted = self.attention(student, teacher) * torch.stack(distances, 1)
        return weighted.sum(2).mean(0)


def projection(channels: int, width: int) -> nn.Sequential:
    """Return a linear layer and a batch norm, which always takes the statistics of the batch."""
    return nn.Sequential(
        nn.Linear(channels, width), nn.BatchNorm1d(width, track_running_stats=False)
    )


def energy(layer: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean square over channels at each place, as rows of unit length."""
    squares = layer.square().mean(1, keepdim=True)
    return F.normalize(F.adaptive_avg_pool2d(squares, size).flatten(1), dim=1)
