"""What all distillers have in common: what they are given, and what they return."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from parts.models.segmenter import Segmenter

LAYERS, EMBEDDING, TOKENS, LOGITS = "layers", "embedding", "tokens", "logits"


@dataclass
class Pass:
    """What one pass of a model leaves, in float32 or float64.

    Attributes:
        layers: Outputs of transformer blocks, from shallow to deep, each (B, C, H, W).
        embedding: The image embedding, which the decoder is given, (B, D, h, w).
        tokens: The mask tokens after the decoder's transformer, (B, N, D).
        logits: The logits of the mask, before they are scaled up, (B, s, s).
    """

    layers: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None
    tokens: Tensor | None = None
    logits: Tensor | None = None


class Distiller(nn.Module):
    """Compares a pass of the student with the teacher's of the same images and prompts.

    Attributes:
        needs: Which parts of a pass it compares.
        least_batch: The fewest images of a batch with which it does what it is meant to do.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    least_batch: ClassVar[int] = 1

    @classmethod
    def build(
        cls, options: argparse.Namespace, teacher: Segmenter, student: Segmenter
    ) -> Distiller:
        """Return the distiller of a run; most need to know nothing of it."""
        return cls()

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            teacher: What the teacher's pass left, without a graph.
            student: What the student's pass left.
            masks: The true masks, bool, (B, H, W). Most distillers have no use for them.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, Tensor]:
        """Return what else of the last loss is worth a column of the log."""
        return {}
