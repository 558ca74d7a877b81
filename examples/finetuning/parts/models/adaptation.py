"""The fine-tuning methods: what each adds to the image encoder, and what it trains."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from parts.errors import InputError
from parts.models.segmenter import Segmenter


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


def free_biases(encoder: nn.Module) -> int:
    """Train every bias; return how many there are."""
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    return len(biases)


def adapt(student: Segmenter, method: str, *, rank: int = 4, targets: list[str]) -> str:
    """Freeze a model except for the mask decoder and for what `method` adds to the image encoder.

    Two heads of the decoder stay frozen, as no mask depends on them: those that estimate the IoU
    and whether there is an object. What they predict remains that of the pre-trained model.

    Args:
        student: The model with its pre-trained weights, changed in place.
        method: One of `METHODS` of the options.
        rank: Rank of LoRA; its alpha is the same.
        targets: Names of the layers that get LoRA. `["qkv"]` is every attention of SAM and SAM2.

    Returns:
        A report of what trains.

    Raises:
        InputError: If the method finds nothing to train in the encoder.
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
        raise InputError(
            f"{method} must match something in the image encoder, got targets {targets} and no "
            f"match. Its linear layers are called {', '.join(linear)}."
        )
    student.decoder.requires_grad_(True)
    for name, module in student.decoder.named_children():
        if name in ("iou_prediction_head", "pred_obj_score_head"):
            module.requires_grad_(False)
    return report(student)


def report(student: nn.Module) -> str:
    """Return a table of how many parameters train, in the encoder, the decoder and the model."""
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


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor."""
    return {name: value.shape for name, value in state.items()}


@torch.no_grad()
def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `trainable_state` returned into a module that was adapted in the same way."""
    own, found = shapes(trainable_state(module)), shapes(state)
    if own != found:
        other = sorted(name for name, _ in own.items() ^ found.items())
        raise InputError(
            f"the saved weights must be those that train, {len(own)}, got {len(found)} "
            f"({other[0]}). Was the model adapted in the same way?"
        )
    module.load_state_dict(state, strict=False)
