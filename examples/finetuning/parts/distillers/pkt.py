"""PKT: the images of a batch are alike as they are to the teacher (Passalis and Tefas, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from parts.distillers.base import EMBEDDING, Distiller, Pass

EPS = 1e-7


class PKT(Distiller):
    """The divergence between how likely images are to be neighbours, by their mean embeddings."""

    needs = (EMBEDDING,)
    least_batch = 2

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        # In float32 small divergences would be rounding.
        of_student, of_teacher = (p.embedding.mean((2, 3)).double() for p in (student, teacher))
        return neighbour_divergence(of_student, of_teacher).to(student.embedding.dtype)


def neighbour_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all pairs of P_t log(P_t / P_s), for one sample a row (B, F)."""
    p, q = neighbours(teacher), neighbours(student)
    return (p * ((p + EPS) / (q + EPS)).log()).mean()


def neighbours(samples: Tensor) -> Tensor:
    """Return how likely each sample is to be the neighbour of each, and of itself, (B, B)."""
    unit = samples / (torch.linalg.vector_norm(samples, dim=1, keepdim=True) + EPS)
    similarity = (unit @ unit.mT + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)
