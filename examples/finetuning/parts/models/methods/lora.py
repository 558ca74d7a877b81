"""LoRA: products of two narrow matrices that are added to weights."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from parts.errors import InputError


def add_lora(encoder: nn.Module, rank: int, targets: list[str]) -> int:
    """Add LoRA with alpha = rank to the linear layers of these names; return how many layers."""
    found = [
        name
        for name, layer in encoder.named_modules()
        if name.split(".")[-1] in targets and isinstance(layer, nn.Linear)
    ]
    if found:
        check_rank(rank, [encoder.get_submodule(name) for name in found])
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=found), encoder)
    return len(found)


def check_rank(rank: int, layers: list[nn.Linear]) -> None:
    """Raise `InputError` if a rank is above that of the layers themselves."""
    width = min(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > width:
        raise InputError(f"--rank must be at most {width}, the width of a layer, got {rank}")


class HeadLoRA(nn.Module):
    """LoRA with projections of their own for query, key and value of each head, Eq. 31 and 32.

    The LoRA of PEFT, which the released code uses, has a single down-projection for the fused qkv
    of all heads.

    Args:
        qkv: The layer to adapt. Its outputs are query, key and value, each of all heads.
        heads: The number of heads.
        rank: Rank of the product of each projection.
    """

    def __init__(self, qkv: nn.Linear, heads: int, rank: int) -> None:
        super().__init__()
        parts, width = 3 * heads, qkv.out_features // (3 * heads)
        self.down = nn.Parameter(torch.empty(parts, rank, qkv.in_features))
        self.up = nn.Parameter(torch.zeros(parts, width, rank))
        # PEFT and nn.Linear draw their weights from the same range.
        nn.init.uniform_(self.down, -(qkv.in_features**-0.5), qkv.in_features**-0.5)

    def weight(self) -> Tensor:
        """Return what is added to the weight of the layer, shape (3 D, D)."""
        return (self.up @ self.down).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output of the layer, shape (..., 3 D)."""
        projected = torch.einsum("...d,prd->...pr", x, self.down)
        return torch.einsum("...pr,pwr->...pw", projected, self.up).flatten(-2)


def with_heads(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Add to a layer's output what its own `heads` give, unless they are merged; a forward hook."""
    return output + module.heads(inputs[0]) if hasattr(module, "heads") else output


def add_head_lora(encoder: nn.Module, rank: int) -> int:
    """Add a LoRA for each head to the qkv of every attention; return how many attentions."""
    attentions = [block.attn for block in encoder.modules() if hasattr(block, "attn")]
    check_rank(rank, [attention.qkv for attention in attentions])
    for attention in attentions:
        names = ("num_heads", "num_attention_heads")
        heads = next(getattr(attention, name) for name in names if hasattr(attention, name))
        attention.qkv.heads = HeadLoRA(attention.qkv, heads, rank)
        attention.qkv.register_forward_hook(with_heads)
    return len(attentions)
