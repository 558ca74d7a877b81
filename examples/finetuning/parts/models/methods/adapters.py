"""Adapters: bottlenecks behind the layers of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """A bottleneck with a residual connection, Eq. 26-29 of the paper.

    The up-projection starts at zero, so that the student starts as the teacher. In the released
    code it starts at random.

    Args:
        dim: Channels of input and output.
        ratio: Channels of the bottleneck, as a share of `dim`.
    """

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        self.down = nn.Linear(dim, int(dim * ratio))
        self.up = nn.Linear(self.down.out_features, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + Up(GELU(Down(x))), shape (..., dim)."""
        return x + self.up(F.gelu(self.down(x)))


def adapted(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> object:
    """Send a layer's output through the layer's own `adapter`; a forward hook."""
    if isinstance(output, tuple):
        return module.adapter(output[0]), *output[1:]
    return module.adapter(output)


def add_adapters(encoder: nn.Module) -> int:
    """Put an Adapter behind attention and MLP of each transformer block; return how many blocks."""
    blocks = [block for block in encoder.modules() if hasattr(block, "attn")]
    for block in blocks:
        norm = block.norm2 if hasattr(block, "norm2") else block.layer_norm2
        for layer in (block.attn, block.mlp):
            # The hook finds the adapter through the layer that it is called with. A hook that held
            # the adapter itself would, in a copy of the model, still use that of the original.
            layer.adapter = Adapter(*norm.normalized_shape).to(norm.weight.device)
            layer.register_forward_hook(adapted)
    return len(blocks)
