"""Conv-LoRA: LoRA whose narrow map goes through one of several convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.models.methods.adapters import transformer_blocks
from parts.models.methods.lora import check_rank

EXPERTS = 8
LEAST_NOISE = 0.01  # standard deviation, of the gate's logits
LOAD_WEIGHT = 0.01


class ConvLoRA(nn.Module):
    """What Conv-LoRA adds to a linear layer: Up(h + E(h)) with h = Down(x), which is a map.

    E is one of eight experts, which a gate chooses for each map by its mean. Expert k enlarges the
    map k times, convolves it, and reduces it to its size. In training the gate has noise. As one
    expert has all of the gate's weight, the output gives the gate no gradient; `load_loss` does.

    A map is what the layer is given at a time. In SAM that is a window of an image, but in the
    blocks with global attention it is an image.

    Args:
        layer: The layer to adapt, with maps (B, H, W, C) as its input.
        rank: Channels of h, and alpha.

    Attributes:
        load_loss: How unequally the last maps were distributed, a term of the training loss.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.experts = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1) for _ in range(EXPERTS))
        self.gate = nn.Parameter(torch.zeros(rank, EXPERTS))
        self.noise = nn.Parameter(torch.zeros(rank, EXPERTS))
        for zero in (self.up.weight, *(expert.bias for expert in self.experts)):
            nn.init.zeros_(zero)
        self.load_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output of the layer, shape (B, H, W, out_features)."""
        maps = self.down(x).permute(0, 3, 1, 2)
        chosen = self.choose(maps)
        order = chosen.argsort(stable=True)
        groups = maps[order].split(chosen.bincount(minlength=EXPERTS).tolist())
        # An expert without a map runs as well, on none. Its gradient is then zero, and not missing,
        # which DistributedDataParallel would take for an error.
        seen = torch.cat([self.look(group, number) for number, group in enumerate(groups)])
        return self.up((maps + seen[order.argsort()]).permute(0, 2, 3, 1))

    def look(self, maps: Tensor, number: int) -> Tensor:
        """Return what an expert makes of maps (B, rank, H, W)."""
        larger = F.interpolate(maps, scale_factor=number + 1, mode="bicubic")
        seen = F.gelu(self.experts[number](larger))
        return F.interpolate(seen, size=maps.shape[2:], mode="bicubic")

    def choose(self, maps: Tensor) -> Tensor:
        """Return the number of an expert for each map, and keep the load loss."""
        # The loss divides by small numbers, which half precision does not have.
        with torch.autocast(maps.device.type, enabled=False):
            pooled = maps.mean((2, 3)).to(self.gate.dtype)
            logits = clean = pooled @ self.gate
            if self.training:
                deviation = F.softplus(pooled @ self.noise) + LEAST_NOISE
                logits = clean + deviation * torch.randn_like(clean)
            chosen = logits.argmax(1)
            is_chosen = F.one_hot(chosen, EXPERTS)
            importance = load = is_chosen.sum(0).to(clean.dtype)
            if self.training:
                # How likely each expert would be chosen if its noise were drawn again.
                best, second = logits.topk(2).values.split(1, dim=1)
                others = torch.where(is_chosen.bool(), second, best)
                load = torch.special.ndtr((clean - others) / deviation).sum(0)
            self.load_loss = LOAD_WEIGHT * (variation(importance) + variation(load))
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with gradients cannot be copied with its module.
        return {**vars(self), "load_loss": None}


def variation(values: Tensor) -> Tensor:
    """Return the squared coefficient of variation."""
    return values.var() / (values.mean().square() + 1e-10)


def load_loss(model: nn.Module) -> Tensor | None:
    """Return the sum of the load losses of a model's last forward, or None without Conv-LoRA."""
    layers = [layer for layer in model.modules() if isinstance(layer, ConvLoRA)]
    losses = [layer.load_loss for layer in layers if layer.load_loss is not None]
    return torch.stack(losses).sum() if losses else None


def with_convolutions(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Add to a layer's output what its own `conv_lora` gives; a forward hook."""
    return output + layer.conv_lora(inputs[0])


def add_conv_lora(encoder: nn.Module, rank: int) -> int:
    """Add Conv-LoRA with alpha = rank to the qkv of every attention; return how many attentions."""
    layers = [block.attn.qkv for block in transformer_blocks(encoder)]
    check_rank(rank, layers)
    for layer in layers:
        layer.conv_lora = ConvLoRA(layer, rank).to(layer.weight.device)
        layer.register_forward_hook(with_convolutions)
    return len(layers)
