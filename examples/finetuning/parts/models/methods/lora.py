"""LoRA: products of two narrow matrices that are added to weights."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from parts.errors import InputError
from parts.models.methods.adapters import transformer_blocks


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
    widths = (min(layer.in_features, layer.out_features) for layer in layers)
    width = min(widths, default=rank)
    if rank > width:
        raise InputError(f"--rank must be at most {width}, the width of a layer, got {rank}")


class PartLoRA(nn.Module):
    """LoRA with projections of their own for equal parts of a layer's output, Eq. 31 and 32.

    The LoRA of PEFT, which the released code uses, has a single down-projection for the fused qkv
    of all heads.

    Args:
        qkv: The layer to adapt. Its outputs are query, key and value, each of all heads.
        parts: The number of parts, 3 for each head or 3 in all.
        rank: Rank of the product of each projection.
        every: The first part has LoRA, and every so many after it; the others stay as they are.
    """

    def __init__(self, qkv: nn.Linear, parts: int, rank: int, every: int = 1) -> None:
        super().__init__()
        self.count, self.every = parts, every
        adapted = len(range(0, parts, every))
        self.down = nn.Parameter(torch.empty(adapted, rank, qkv.in_features))
        self.up = nn.Parameter(torch.zeros(adapted, qkv.out_features // parts, rank))
        # PEFT and nn.Linear draw their weights from the same range.
        nn.init.uniform_(self.down, -(qkv.in_features**-0.5), qkv.in_features**-0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of one LoRA that does the same, (R, D) and (3 D, R).

        Its rank R is the sum of those of all parts.
        """
        blocks = torch.block_diag(*self.up)
        up = self.placed(blocks.T.unflatten(1, self.up.shape[:2])).T
        return self.down.flatten(0, 1), up

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output of the layer, shape (..., 3 D)."""
        projected = torch.einsum("...d,prd->...pr", x, self.down)
        return self.placed(torch.einsum("...pr,pwr->...pw", projected, self.up))

    def placed(self, adapted: Tensor) -> Tensor:
        """Return adapted parts (..., p, w) side by side, with zeros for the others."""
        *shape, _, width = adapted.shape
        output = adapted.new_zeros(*shape, self.count, width)
        output[..., :: self.every, :] = adapted
        return output.flatten(-2)


def with_parts(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Add to a layer's output what its own `parts` give, unless they are merged; a forward hook."""
    return output + module.parts(inputs[0]) if hasattr(module, "parts") else output


def add_part_lora(encoder: nn.Module, rank: int, *, heads: bool) -> int:
    """Add a LoRA for parts of the qkv of every attention; return how many attentions.

    Args:
        encoder: The image encoder, changed in place.
        rank: Rank of each LoRA.
        heads: Whether query, key and value of each head have one, as in the paper. Otherwise the
            query and the value of all heads have one each, and the key has none, as in SU-SAM.
    """
    attentions = [block.attn for block in transformer_blocks(encoder)]
    check_rank(rank, [attention.qkv for attention in attentions])
    for attention in attentions:
        qkv = attention.qkv
        names = ("num_heads", "num_attention_heads")
        count = next(getattr(attention, name) for name in names if hasattr(attention, name))
        lora = PartLoRA(qkv, 3 * count, rank) if heads else PartLoRA(qkv, 3, rank, every=2)
        qkv.parts = lora.to(qkv.weight.device)
        qkv.register_forward_hook(with_parts)
    return len(attentions)
