"""PKD: image embeddings correlate (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from parts.distillers.base import EMBEDDING, Distiller, Pass


class PKD(Distiller):
    """One minus the Pearson correlation of each channel over the batch and all places."""

    needs = (EMBEDDING,)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        resized = student.embedding
        size = teacher.embedding.shape[-2:]
        if resized.shape[-2:] != size:
            resized = F.interpolate(resized, size, mode="bilinear")
        return F.mse_loss(standardized(resized), standardized(teacher.embedding)) / 2


def standardized(maps: Tensor) -> Tensor:
    """Return maps (B, C, H, W) whose channels have mean zero and deviation one."""
    dims = (0, 2, 3)
    return (maps - maps.mean(dims, keepdim=True)) / (maps.std(dims, keepdim=True) + 1e-6)
