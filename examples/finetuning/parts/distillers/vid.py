"""VID: the teacher's layers can be told from the student's (Ahn et al., CVPR 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.distillers.base import LAYERS, Distiller, Pass

FIRST_VARIANCE, LEAST_VARIANCE = 5.0, 1e-5


class VID(Distiller):
    """A bound on the information that layers of the student have of the teacher's.

    Args:
        student: Channels of the student's layers.
        teacher: Channels of the teacher's layers, of which there are as many.
    """

    needs = (LAYERS,)

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(map(Gaussian, student, teacher))

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss, a sum over layers."""
        layers = zip(self.pairs, student.layers, teacher.layers, strict=True)
        return sum(pair(of_student, of_teacher) for pair, of_student, of_teacher in layers)


class Gaussian(nn.Module):
    """What a layer of the student says of the teacher's: a mean, and a variance of each channel."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher, teacher, 1, bias=False),
        )
        # The inverse of softplus, which makes the variance of it.
        raw = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.raw_variance = nn.Parameter(torch.full((teacher,), raw))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of the teacher's layer, but for a constant."""
        student, teacher = of_one_size(student, teacher)
        variance = (F.softplus(self.raw_variance) + LEAST_VARIANCE)[:, None, None]
        return ((self.mean(student) - teacher).square() / variance + variance.log()).mean() / 2


def of_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps, the larger averaged to the size of the smaller."""
    size = min(one.shape[-2:], other.shape[-2:])
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)
