"""What the programs ask of a model, whichever package it is from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.errors import InputError, first_line

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Segmenter(nn.Module):
    """A package's unedited model, with a `forward` from pictures and prompts to mask logits.

    It computes gradients, and takes one prompt for each of many pictures. The packages' own entry
    points run under `no_grad`, or take many prompts for one picture.

    Attributes:
        model: The package's model.
        frame: How the model wants its input.
        dim: Channels of the image embedding and of the mask tokens.
        decodes_embedding_alone: Whether masks depend on the image embedding alone, so that finer
            levels are not missed.
    """

    # Every SAM and SAM2 has a place of the image embedding for 16 by 16 pixels of the input.
    stride = 16
    decodes_embedding_alone = True

    def __init__(self, model: nn.Module, frame: Frame, dim: int) -> None:
        super().__init__()
        self.model, self.frame, self.dim = model, frame, dim

    @property
    def encoder(self) -> nn.Module:
        """The image encoder."""
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """The mask decoder."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks of the image encoder, whose outputs have their channels last."""
        raise NotImplementedError

    @property
    def stages(self) -> list[int]:
        """The blocks whose outputs say most: those of global attention, or the ends of stages."""
        raise NotImplementedError

    def channels(self, block: int) -> int:
        """Return the channels of a block's output."""
        return second_norm(self.blocks[block]).normalized_shape[0]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return what the decoder needs of images (B, 3, size, size), the image embedding last."""
        raise NotImplementedError

    def decode(self, levels: list[Tensor], prompts: Prompts) -> Tensor:
        """Return mask logits (B, h, w), given one prompt for each image.

        `levels` may hold the image embedding alone. The mask tokens are then the same as with all
        levels, but the masks of SAM2 are not.
        """
        raise NotImplementedError

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        """Return mask logits (B, h, w) for images (B, 3, size, size) with one prompt each."""
        return self.decode(self.encode(images), prompts)


def second_norm(block: nn.Module) -> nn.LayerNorm:
    """Return the LayerNorm before the MLP of a transformer block."""
    return block.norm2 if hasattr(block, "norm2") else block.layer_norm2


def build(package: str, name: str, weights: Path | None) -> Segmenter:
    """Return a model before it is adapted.

    Args:
        package: The file beside this one that builds it.
        name: What the package calls it.
        weights: Its official checkpoint. Without one, the weights are random, unless the name is
            that of a folder, which holds them.
    """
    if weights is None and not Path(name).is_dir():
        print(
            f"Warning: without a checkpoint, {name} has random weights. Its results say no more "
            "than that everything works."
        )
    return import_module(f"parts.models.{package}").build(name, weights)


def check_teacher(teacher: Segmenter, student: Segmenter) -> None:
    """Raise `InputError` if the two do not see the same input, or if they cannot be compared."""
    if (teacher.frame, teacher.dim) != (student.frame, student.dim):
        raise InputError(
            f"--teacher must take pictures and have channels as --model does, {student.frame} and "
            f"{student.dim}, got {teacher.frame} and {teacher.dim}"
        )


def load_weights(model: nn.Module, checkpoint: Path, name: str, key: str | None = None) -> None:
    """Load an official checkpoint, either all of it or nothing.

    Args:
        model: The package's model, changed in place.
        checkpoint: A file that was written by `torch.save` or by safetensors.
        name: Name of the model, for the error message.
        key: The entry of the file under which the weights may be.

    Raises:
        InputError: If the file is missing, damaged, of another model, or if it holds weights that
            are not finite or not of floating point.
    """
    weights = read_weights(checkpoint)
    if key is not None:
        weights = weights.get(key, weights)
    load_state(model, weights, checkpoint, name)


def read_weights(checkpoint: Path, option: str = "--checkpoint") -> dict[str, Any]:
    """Return what a file holds that was written by `torch.save` or by safetensors.

    Raises:
        InputError: If the file is missing, damaged, or holds anything without names.
    """
    try:
        if checkpoint.suffix == ".safetensors":
            weights: Any = load_file(checkpoint)
        else:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises an exception of its own type
        raise InputError(
            f"{option} must be a readable file, got {checkpoint}: {first_line(error)}"
        ) from error
    check_named(weights, checkpoint, option)
    return weights


def check_named(weights: object, checkpoint: Path, option: str = "--checkpoint") -> None:
    """Raise `InputError` if weights are not tensors by name."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise InputError(f"{option} must hold named tensors, got {checkpoint}")


def load_state(
    model: nn.Module,
    weights: dict[str, Any],
    checkpoint: Path,
    name: str,
    option: str = "--checkpoint",
) -> None:
    """Load what was read from a checkpoint; arguments and errors are those of `load_weights`."""
    check_named(weights, checkpoint, option)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: getattr(value, "shape", None) for key, value in weights.items()}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])
    if missing or unexpected or reshaped:
        examples = ", ".join([*reshaped[:2], *missing[:2], *unexpected[:2]])
        raise InputError(
            f"{option} must be of {name}, got {checkpoint}: {len(missing)} weights missing, "
            f"{len(unexpected)} unexpected, {len(reshaped)} of another shape ({examples}). "
            "Is it of another size?"
        )
    wrong = [key for key, value in model.state_dict().items() if not is_like(weights[key], value)]
    if wrong:
        found = weights[wrong[0]]
        raise InputError(
            f"{option} must hold dense tensors of floating point, got {checkpoint}: "
            f"{len(wrong)} others ({wrong[0]}: {found.dtype}, {found.layout})"
        )
    check_finite(weights, f"{option} must hold finite weights, got {checkpoint}")
    model.load_state_dict(weights)


def is_like(found: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor holds values that another can take over as they are."""
    floating = found.dtype in FLOATING if expected.is_floating_point() else True
    return floating and found.layout == expected.layout and not found.is_meta


def check_finite(weights: Mapping[str, Tensor], message: str) -> None:
    """Raise `InputError` with a message if a weight is not finite, and name the first of them."""
    wrong = [name for name, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise InputError(
            f"{message}: {len(wrong)} of {len(weights)} tensors are not finite ({wrong[0]})"
        )
