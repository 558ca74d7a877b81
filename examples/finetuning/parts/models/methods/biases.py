"""BitFit: the biases train."""

from __future__ import annotations

from torch import nn


def free_biases(encoder: nn.Module) -> int:
    """Train every bias; return how many there are."""
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    return len(biases)
