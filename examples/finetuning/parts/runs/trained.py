"""Trained students: loaded from their runs, and exported to official checkpoints."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from accelerate.utils import set_seed
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from parts.errors import InputError
from parts.files import appearing
from parts.models.adaptation import NOT_MERGED, adapt, add_method, shapes
from parts.models.methods.lora import PartLoRA
from parts.models.segmenter import Segmenter, build, check_finite, check_teacher
from parts.runs import checkpoint
from parts.runs.folder import STUDENT, TEACHER, check_weights, read_options


def load_run(
    folder: Path, epoch: int | None = None, given: argparse.Namespace | None = None
) -> tuple[Segmenter, argparse.Namespace]:
    """Return the student of a run in eval mode, and the options of the run.

    Args:
        folder: The `--output` of a fine-tuning script.
        epoch: The epoch after which the student is wanted, or 0 for the pre-trained model. By
            default it is the one with the best validation IoU so far.
        given: Where data and weights are now, as `add_moved` of the options has it.

    Raises:
        InputError: If the folder holds no run, or no checkpoint of that epoch, or if the weights
            that the run started from are not there.
    """
    options = read_options(folder, given)
    best = checkpoint.best_epoch(folder)
    epoch = best if epoch is None else epoch
    weights = checkpoint.epoch_folder(folder, epoch)
    if epoch and not weights.exists():
        raise InputError(f"{folder} must hold the checkpoint of epoch {epoch}, there is none")
    check_weights(folder, options, STUDENT)
    # The weights of a small model without a checkpoint are those that this seed draws.
    set_seed(options.seed)
    student = build(options.package, options.model, options.checkpoint)
    if epoch:
        adapt(student, options.method, rank=options.rank, targets=options.targets)
        checkpoint.load_weights(weights, {"student": student})
    return student.eval().requires_grad_(False), options


def load_teacher(folder: Path, given: argparse.Namespace | None = None) -> Segmenter:
    """Return the teacher of a run in eval mode; the arguments are those of `load_run`."""
    options = read_options(folder, given)
    check_weights(folder, options, (*STUDENT, *TEACHER))
    return teacher_and_student(options)[0]


def teacher_and_student(options: argparse.Namespace) -> tuple[Segmenter, Segmenter]:
    """Return the frozen teacher, and the student before it is adapted.

    The seed draws the weights of the student and then those of the teacher, where they have none.
    """
    set_seed(options.seed)
    student = build(options.package, options.model, options.checkpoint)
    if options.teacher is None:
        teacher = copy.deepcopy(student)
    else:
        teacher = build(options.package, options.teacher, options.teacher_checkpoint)
        check_teacher(teacher, student)
    return teacher.eval().requires_grad_(False), student


def merge_lora(model: nn.Module) -> None:
    """Add the products of LoRA to the weights that they adapt, and remove the layers of LoRA."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, PartLoRA):
            qkv = model.get_submodule(name.removesuffix(".parts"))
            down, up = layer.factors()
            qkv.weight.data += up @ down
            del qkv.parts


def check_merged(run: Path, options: argparse.Namespace) -> None:
    """Raise `InputError` unless the method of a run is merged into the weights."""
    if options.method in NOT_MERGED:
        raise InputError(
            f"--average needs a method that is merged into the weights, such as lora or decoder; "
            f"{run} has {options.method}"
        )


@torch.no_grad()
def average(student: Segmenter, start: Segmenter, share: float) -> None:
    """Mix a trained student with the model that it was before, as WiSE-FT does.

    Args:
        student: The student, from `load_run`, whose method is merged into the weights.
        start: The same model before training.
        share: How much of the weights is the student's.
    """
    merge_lora(student.model)
    before = start.state_dict()
    for name, value in student.state_dict().items():
        if value.is_floating_point():
            value.lerp_(before[name], 1 - share)


def export(student: Segmenter, options: argparse.Namespace, path: Path) -> None:
    """Write a trained student as a checkpoint of its package; LoRA is merged into the student.

    Args:
        student: The student, from `load_run`.
        options: The options of its run, from `load_run`.
        path: A file that `sam_model_registry` or `build_sam2` loads, or a folder that
            `from_pretrained` loads. A student of a method that is not merged has another
            architecture; what is written of it is loaded by `load_adapters`. The file of a HQ-SAM
            of segment_anything has the layout of the released ones.

    Raises:
        InputError: If the path exists.
        OSError: If the disk is full or cannot be written to. Nothing has the name then.
    """
    merge_lora(student.model)
    check_finite(student.model.state_dict(), "the student must have finite weights")
    with appearing(path) as place:
        if options.package == "huggingface":
            from parts.models import huggingface

            huggingface.export(student.model, options.model, place)
            return
        state = student.model.state_dict()
        checkpoint.save_torch({"model": state} if options.package == "sam2" else state, place)


def load_adapters(model: nn.Module, path: Path, method: str = "adapter") -> nn.Module:
    """Turn an official model into a student with what its method has added.

    Args:
        model: A `Sam`, `SAM2Base`, `SamModel` or `Sam2Model` of the student's size, as the package
            builds it. It is changed in place, and its weights do not matter.
        path: What `export` wrote of the student.
        method: The student's method, one of those that are not merged into the weights. `adapter`
            and those of SU-SAM have the same weights in other places: a file of one is not told
            from that of another.

    Returns:
        The model, ready for the package's predictor.

    Raises:
        InputError: If the file is of another method, or of a model of another size.

    Example:
        `SamPredictor(load_adapters(sam_model_registry["vit_b"](), Path("leaf.pth")))`
    """
    if method not in NOT_MERGED:
        raise InputError(
            f"method must be one of {', '.join(NOT_MERGED)}, got {method}. The others are merged: "
            "load the file as the package loads its own."
        )
    if path.is_dir():
        state = load_file(path / "model.safetensors")
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
    official = {*model.state_dict()}
    encoder = model.vision_encoder if hasattr(model, "vision_encoder") else model.image_encoder
    ranks = (len(value) for name, value in state.items() if name.endswith("conv_lora.down.weight"))
    decoder = model.sam_mask_decoder if hasattr(model, "sam_mask_decoder") else model.mask_decoder
    add_method(encoder, decoder, method, rank=next(ranks, 1), targets=[])
    own, found = shapes(model.state_dict()), shapes(state)
    # Tied weights are in a folder's file under one of their names, so that the others are missing.
    tied = official - found.keys() if path.is_dir() else set()
    wrong = sorted(name for name, _ in own.items() ^ found.items() if name not in tied)
    if wrong:
        raise InputError(
            f"{path} must hold a model of this size with {method}, got {len(wrong)} weights that "
            f"it has not, or that are missing or of another shape ({wrong[0]})"
        )
    model.load_state_dict(state, strict=False)
    return model.eval()
