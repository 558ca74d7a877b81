"""ReviewKD: shallow layers learn with the help of deep ones (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.distillers.base import LAYERS, Distiller, Pass

POOLED = (4, 2, 1)  # sizes at which maps are compared as well, with halving weights


class ReviewKD(Distiller):
    """The distance of the teacher's layers to what is fused of the student's, from deep to shallow.

    Args:
        student: Channels of the student's layers.
        teacher: Channels of the teacher's layers, of which there are as many.
        width: Channels in which layers are fused.
    """

    needs = (LAYERS,)

    def __init__(self, student: Sequence[int], teacher: Sequence[int], width: int = 256) -> None:
        super().__init__()
        channels = list(zip(student, teacher, strict=True))[::-1]
        self.fusions = nn.ModuleList(
            Fusion(s, t, width, gated=i > 0) for i, (s, t) in enumerate(channels)
        )

    def fused(self, layers: list[Tensor]) -> list[Tensor]:
        """Return the student's layers, each fused with the deeper ones, from shallow to deep."""
        outputs, deeper = [], None
        for fuse, layer in zip(self.fusions, reversed(layers), strict=True):
            output, deeper = fuse(layer, deeper)
            outputs.append(output)
        return outputs[::-1]

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss, a sum over layers."""
        pairs = zip(self.fused(student.layers), teacher.layers, strict=True)
        return sum(pyramid_distance(*pair) for pair in pairs)


class Fusion(nn.Module):
    """Fuses a layer with what was made of the deeper ones."""

    def __init__(self, student: int, teacher: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.enter = convolution(student, width, 1)
        self.gate = nn.Conv2d(2 * width, 2, 1) if gated else None
        self.leave = convolution(width, teacher, 3)

    def forward(self, layer: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to compare, and the one that the next layer is fused with."""
        fused = self.enter(layer)
        if self.gate is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            own, other = self.gate(torch.cat([fused, deeper], 1)).sigmoid().split(1, 1)
            fused = own * fused + other * deeper
        return self.leave(fused), fused


def convolution(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Return a convolution that keeps the size, and a batch norm of the batch's own statistics."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, track_running_stats=False))


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return a weighted mean of the squared distances of two maps and of their averages."""
    total, weights, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for size in POOLED:
        if size >= student.shape[2]:
            continue
        weight /= 2
        pair = (F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
        total = total + weight * F.mse_loss(*pair)
        weights += weight
    return total / weights
