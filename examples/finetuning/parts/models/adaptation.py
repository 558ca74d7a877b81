"""Adapting a model: what a fine-tuning method adds to it, and what then trains."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from parts.errors import InputError
from parts.models.methods.adapters import PLACES, add_adapters, add_adaptformer
from parts.models.methods.biases import free_biases
from parts.models.methods.convlora import add_conv_lora
from parts.models.methods.hqsam import add_hq
from parts.models.methods.lora import add_lora, add_part_lora
from parts.models.segmenter import Segmenter

# What these add is no change of weights, so that it stays beside those of the model.
NOT_MERGED = (*PLACES, "adaptformer", "conv-lora", "hq-sam")


def adapt(student: Segmenter, method: str, *, rank: int = 4, targets: list[str]) -> str:
    """Freeze a model except for the mask decoder and for what `method` adds to the image encoder.

    Two heads of the decoder stay frozen, as no mask depends on them: those that estimate the IoU
    and whether there is an object. What they predict remains that of the pre-trained model.

    HQ-SAM adds to the decoder, and nothing else trains, as in its release. The paper does not say
    what its row of HQ-SAM trains.

    Args:
        student: The model with its pre-trained weights, changed in place.
        method: One of `METHODS` of the options.
        rank: Rank of every kind of LoRA; its alpha is the same.
        targets: Names of the layers that `lora` adapts. `["qkv"]` is every attention of SAM and
            SAM2, as with the other kinds of LoRA.

    Returns:
        A report of what trains.

    Raises:
        InputError: If the method finds nothing to train in the encoder, or is not made for it.
    """
    student.requires_grad_(False)
    matched = add_method(student.encoder, student.decoder, method, rank, targets)
    if method == "hq-sam":
        return report(student)
    if matched == 0:
        layers = student.encoder.named_modules()
        linear = sorted({n.split(".")[-1] for n, layer in layers if isinstance(layer, nn.Linear)})
        raise InputError(
            f"{method} must match something in the image encoder, got targets {targets} and no "
            f"match. Its linear layers are called {', '.join(linear) or '(it has none)'}. The "
            "methods bitfit and decoder fit any image encoder."
        )
    student.decoder.requires_grad_(True)
    for name, module in student.decoder.named_children():
        if name in ("iou_prediction_head", "pred_obj_score_head"):
            module.requires_grad_(False)
    return report(student)


def add_method(
    encoder: nn.Module, decoder: nn.Module, method: str, rank: int, targets: list[str]
) -> int | None:
    """Add what a method adds to image encoder or decoder; return to how many layers, if to any.

    The other arguments are those of `adapt`.
    """
    add = {
        "lora": partial(add_lora, rank=rank, targets=targets),
        "lora-heads": partial(add_part_lora, rank=rank, heads=True),
        "su-sam-lora": partial(add_part_lora, rank=rank, heads=False),
        "conv-lora": partial(add_conv_lora, rank=rank),
        "adaptformer": add_adaptformer,
        "hq-sam": partial(add_hq, decoder=decoder),
        "bitfit": free_biases,
        "decoder": lambda encoder: None,
    }
    add |= {name: partial(add_adapters, method=name) for name in PLACES}
    return add[method](encoder)


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
    # An older version called the factors of LoRA for heads so.
    state = {name.replace(".qkv.heads.", ".qkv.parts."): value for name, value in state.items()}
    own, found = shapes(trainable_state(module)), shapes(state)
    if own != found:
        missing, others = own.keys() - found.keys(), found.keys() - own.keys()
        example = sorted(name for name, _ in own.items() ^ found.items())[0]
        raise InputError(
            f"the saved weights must be those that train: {len(missing)} are missing, "
            f"{len(others)} are others ({example}). Was the model adapted in the same way?"
        )
    module.load_state_dict(state, strict=False)
