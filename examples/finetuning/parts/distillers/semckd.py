"""SemCKD: each layer learns from those of the teacher that suit it (Chen et al., AAAI 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.distillers.base import LAYERS, Distiller, Pass
from parts.distillers.vid import of_one_size


class SemCKD(Distiller):
    """Distances between all pairs of layers, weighted by a learned attention.

    What a layer is matched by are its similarities between the images of the batch. With a batch of
    four they are embedded in a single dimension of unit length, through which no gradient passes.

    Args:
        student: Channels of the student's layers.
        teacher: Channels of the teacher's layers.
        batch: The number of images, at least 4.
        width: Channels inside of the regressors. By default it is twice those of the teacher's
            layer, as in the official code.
    """

    needs = (LAYERS,)
    least_batch = 4

    def __init__(
        self, student: Sequence[int], teacher: Sequence[int], batch: int, width: int | None = None
    ) -> None:
        super().__init__()
        self.queries = nn.ModuleList(embedding(batch) for _ in student)
        self.keys = nn.ModuleList(embedding(batch) for _ in teacher)
        self.regressors = nn.ModuleList(
            nn.ModuleList(regressor(s, t, width or 2 * t) for t in teacher) for s in student
        )

    def attention(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return how well layers suit, (B, student's, teacher's); it sums to 1 over the last."""
        queries, keys = (
            torch.stack([embed(layer) for embed, layer in zip(each, layers, strict=True)], 1)
            for each, layers in ((self.queries, student), (self.keys, teacher))
        )
        return (queries @ keys.mT).softmax(-1)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        distances = [
            [distance(regress, of_student, of_teacher) for regress, of_teacher in pairs]
            for of_student, pairs in (
                (layer, zip(row, teacher.layers, strict=True))
                for layer, row in zip(student.layers, self.regressors, strict=True)
            )
        ]
        table = torch.stack([torch.stack(row, -1) for row in distances], -2)
        return (self.attention(student.layers, teacher.layers) * table).mean((0, 1)).sum()


class Similarities(nn.Module):
    """The inner products of each image of the batch with all of them, (B, B)."""

    def forward(self, layer: Tensor) -> Tensor:
        """Return them for a layer (B, C, H, W)."""
        rows = layer.flatten(1)
        return rows @ rows.mT


class UnitLength(nn.Module):
    """Scales rows to unit length."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return the scaled rows."""
        return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def embedding(batch: int) -> nn.Sequential:
    """Return a module from a layer to a row of unit length for each image of the batch."""
    narrow = batch // 4
    return nn.Sequential(
        Similarities(),
        nn.Linear(batch, 2 * narrow),
        nn.ReLU(),
        nn.Linear(2 * narrow, narrow),
        UnitLength(),
    )


def regressor(student: int, teacher: int, width: int) -> nn.Sequential:
    """Return a module from a layer of the student to the channels of one of the teacher."""
    return nn.Sequential(
        nn.Conv2d(student, width, 1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(width, teacher, 1, bias=False),
    )


def distance(regress: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of each image, (B,)."""
    student, teacher = of_one_size(student, teacher)
    return F.mse_loss(regress(student), teacher, reduction="none").mean((1, 2, 3))
