"""Few trainable parameters: LoRA, Adapter, biases or the decoder alone."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from finetuning.segmenter import Segmenter

METHODS = ("lora", "lora-heads", "adapter", "bitfit", "decoder")


class Adapter(nn.Module):
    """A bottleneck with a residual connection, Eq. 26-29 of the paper.

    The up-projection starts at zero, so that the student starts as the teacher; in the released
    code it starts at random.

    Args:
        dim: Channels.
        ratio: Width of the bottleneck over channels.
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
    """Forward hook: send a layer's output through the layer's own `adapter`."""
    if isinstance(output, tuple):
        return module.adapter(output[0]), *output[1:]
    return module.adapter(output)


def add_adapters(encoder: nn.Module) -> int:
    """Put an Adapter behind attention and MLP of every transformer block; return how many."""
    blocks = [block for block in encoder.modules() if hasattr(block, "attn")]
    for block in blocks:
        norm = block.norm2 if hasattr(block, "norm2") else block.layer_norm2
        for layer in (block.attn, block.mlp):
            # Inside of the layer and found through it, so that copies of the model keep working.
            layer.adapter = Adapter(*norm.normalized_shape).to(norm.weight.device)
            layer.register_forward_hook(adapted)
    return len(blocks)


def add_lora(encoder: nn.Module, rank: int, targets: list[str]) -> int:
    """Add LoRA with alpha = rank to the linear layers of that name; return to how many."""
    found = [
        name
        for name, layer in encoder.named_modules()
        if name.split(".")[-1] in targets and isinstance(layer, nn.Linear)
    ]
    if found:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=found), encoder)
    return len(found)


class HeadLoRA(nn.Module):
    """LoRA with projections of their own for query, key and value of each head, Eq. 31 and 32.

    PEFT's, as in the released code, has one down-projection for the fused qkv of all heads.

    Args:
        qkv: The layer to adapt; its outputs are query, key and value, each of all heads.
        heads: How many.
        rank: Of each head's product.
    """

    def __init__(self, qkv: nn.Linear, heads: int, rank: int) -> None:
        super().__init__()
        parts, width = 3 * heads, qkv.out_features // (3 * heads)
        self.down = nn.Parameter(torch.empty(parts, rank, qkv.in_features))
        self.up = nn.Parameter(torch.zeros(parts, width, rank))
        # As PEFT and nn.Linear: uniform up to one over the root of the inputs.
        nn.init.uniform_(self.down, -(qkv.in_features**-0.5), qkv.in_features**-0.5)

    def weight(self) -> Tensor:
        """Return what is added to the weight of the layer, shape (3 D, D)."""
        return (self.up @ self.down).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the output of the layer, shape (..., 3 D)."""
        projected = torch.einsum("...d,prd->...pr", x, self.down)
        return torch.einsum("...pr,pwr->...pw", projected, self.up).flatten(-2)


def with_heads(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook: add what a layer's own `heads` make of its input, until they are merged."""
    return output + module.heads(inputs[0]) if hasattr(module, "heads") else output


def add_head_lora(encoder: nn.Module, rank: int) -> int:
    """Add LoRA of each head to every attention's qkv; return to how many."""
    attentions = [block.attn for block in encoder.modules() if hasattr(block, "attn")]
    for attention in attentions:
        names = ("num_heads", "num_attention_heads")
        heads = next(getattr(attention, name) for name in names if hasattr(attention, name))
        attention.qkv.heads = HeadLoRA(attention.qkv, heads, rank)
        attention.qkv.register_forward_hook(with_heads)
    return len(attentions)


def free_biases(encoder: nn.Module) -> int:
    """Train every bias; return how many tensors."""
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    return len(biases)


def adapt(student: Segmenter, method: str, *, rank: int = 4, targets: list[str]) -> str:
    """Freeze the model but for what `method` adds to its image encoder and the mask decoder.

    The heads of the decoder that no mask depends on stay frozen: their IoU estimates and object
    scores remain those of the pre-trained model.

    Args:
        student: With its pre-trained weights loaded; changed in place.
        method: One of `METHODS`.
        rank: Of LoRA; its alpha is the same.
        targets: Names of the layers that get LoRA; `["qkv"]` is all attention of SAM and SAM2.

    Returns:
        A report of what trains.

    Raises:
        ValueError: If nothing in the encoder matches.
    """
    student.requires_grad_(False)
    add = {
        "lora": partial(add_lora, rank=rank, targets=targets),
        "lora-heads": partial(add_head_lora, rank=rank),
        "adapter": add_adapters,
        "bitfit": free_biases,
        "decoder": lambda encoder: None,
    }[method]
    matched = add(student.encoder)
    if matched == 0:
        layers = student.encoder.named_modules()
        linear = sorted({n.split(".")[-1] for n, layer in layers if isinstance(layer, nn.Linear)})
        raise ValueError(
            f"{method} must match something in the image encoder, got targets {targets} and no "
            f"match. Its linear layers are called {', '.join(linear)}."
        )
    student.decoder.requires_grad_(True)
    for name, module in student.decoder.named_children():
        if name in ("iou_prediction_head", "pred_obj_score_head"):
            module.requires_grad_(False)
    return report(student)


def report(student: nn.Module) -> str:
    """Return how many parameters train, of encoder and decoder and in all."""
    rows = {"image encoder": student.encoder, "mask decoder": student.decoder, "model": student}
    lines = [f"{'trainable parameters':22}{'of':>14}"]
    for name, module in rows.items():
        trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in module.parameters())
        share = trains / everything
        lines.append(f"{name:16}{trains:12,}{everything:14,}  {share:7.2%}")
    return "\n".join(lines)


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `trainable_state` returned into a module that was adapted in the same way."""
    own = trainable_state(module)
    if own.keys() != state.keys():
        raise ValueError(
            f"the saved weights must be those that train, {len(own)}, got {len(state)}. Was the "
            "model adapted in the same way?"
        )
    module.load_state_dict(state, strict=False)
