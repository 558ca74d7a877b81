"""MobileSAM: image embeddings are equal (Zhang et al., 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from parts.distillers.base import EMBEDDING, Distiller, Pass


class MobileSAM(Distiller):
    """The mean squared distance of the image embeddings."""

    needs = (EMBEDDING,)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        return F.mse_loss(student.embedding, teacher.embedding)
