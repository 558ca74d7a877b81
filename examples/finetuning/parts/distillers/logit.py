"""Logit: the student's masks take after the teacher's (Lan et al., ONE, NeurIPS 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from parts.distillers.base import LOGITS, Distiller, Pass

EPS = 1e-7


class Logit(Distiller):
    """The Kullback-Leibler divergence from the teacher's soft masks to the student's.

    Args:
        temperature: What logits are divided by. The loss is multiplied by its square, so that its
            gradient does not shrink.
    """

    needs = (LOGITS,)

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss; each pixel of a mask is a row of two classes."""
        return divergence(
            two_classes(student.logits), two_classes(teacher.logits), self.temperature
        )


def two_classes(logits: Tensor) -> Tensor:
    """Return logits of object and background (..., 2), given those of the object (...)."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² times the mean over rows of KL(teacher || student), for logits (..., classes)."""
    target = (teacher / temperature).softmax(-1) + EPS
    found = (student / temperature).log_softmax(-1)
    return temperature**2 * (target * (target.log() - found)).sum(-1).mean()
