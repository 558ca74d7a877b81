"""Checkpoints that a kill cannot spoil, and that training resumes from exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parts.errors import InputError, first_line
from parts.files import appearing
from parts.models.adaptation import load_trainable_state, trainable_state
from parts.models.segmenter import check_finite

Modules = Mapping[str, nn.Module]
Weights = dict[str, dict[str, Tensor]]  # by the names of modules and parameters
Others = Mapping[str, Any]  # objects with `state_dict` and `load_state_dict`


def trained_weights(epoch: int, modules: Modules) -> Weights:
    """Return what trains of each module.

    Raises:
        InputError: If a weight is not finite.
    """
    weights = {}
    for name, module in modules.items():
        state = trainable_state(module).items()
        weights[name] = {key: value.contiguous().cpu() for key, value in state}
        check_finite(weights[name], f"epoch {epoch} broke the {name}; train with a smaller --lr")
    return weights


def save(
    folder: Path, epoch: int, best: dict[str, float], weights: Weights, others: Others
) -> None:
    """Write the folder `epoch-NNN` with trained weights and the state of everything else.

    Whenever the process is killed, or the disk is full, this checkpoint is either whole or absent,
    and the earlier ones are whole.

    Args:
        folder: The folder of the run.
        epoch: The number of epochs that are done.
        best: The best epoch so far, and its scores.
        weights: What `trained_weights` returned. It is written to `<name>.safetensors`.
        others: The optimiser and whatever else has a state, by name. They go to `state.pt`.
    """
    state = {name: other.state_dict() for name, other in others.items()}
    with appearing(epoch_folder(folder, epoch)) as unfinished:
        unfinished.mkdir()
        for name, tensors in weights.items():
            save_file(tensors, unfinished / f"{name}.safetensors")
        save_torch({"epoch": epoch, "best": best, **state}, unfinished / "state.pt")


def save_torch(content: object, path: Path) -> None:
    """Write a file by `torch.save`, so that errors of the disk can be told from others."""
    with path.open("wb") as file:
        torch.save(content, file)


def resume(checkpoint: Path, modules: Modules, others: Others) -> tuple[int, dict[str, float]]:
    """Load what `save` wrote; return the number of epochs that are done, and the best so far."""
    load_weights(checkpoint, modules)
    state = load_state(checkpoint)
    try:
        for name, other in others.items():
            other.load_state_dict(state[name])
    except Exception as error:  # what lacks or does not fit raises an exception of its own type
        raise damaged(checkpoint / "state.pt", error) from error
    return epochs_done(checkpoint), state["best"]


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `save` wrote besides the weights.

    Raises:
        InputError: If the file is damaged.
    """
    path = checkpoint / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        best = state["best"]
        if not (isinstance(best["epoch"], int) and isinstance(best["iou"], float)):
            raise TypeError("its best epoch and IoU are no numbers")
        return state
    except PermissionError:
        raise
    except Exception as error:  # each kind of damage raises an exception of its own type
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InputError:
    """Return what to say of a file of a checkpoint that cannot be used, and what to do."""
    checkpoint = path.parent
    if isinstance(error, FileNotFoundError):
        what = f"{path} is missing"
    else:
        what = f"{path} is damaged: {first_line(error).rstrip('.')}"
    if checkpoint == latest(checkpoint.parent):
        return InputError(f"{what}. Remove {checkpoint} to go on from the epoch before.")
    return InputError(f"{what}. Use another epoch.")


def best_epoch(folder: Path) -> int:
    """Return the epoch of a run with the best validation IoU so far."""
    last = latest(folder)
    if last is None:
        raise InputError(f"{folder} must hold a run with a checkpoint")
    return load_state(last)["best"]["epoch"]


def best_weights(folder: Path, name: str) -> Path:
    """Return the file with what the best epoch of a run has of a module."""
    return epoch_folder(folder, best_epoch(folder)) / f"{name}.safetensors"


def load_weights(checkpoint: Path, modules: Modules) -> None:
    """Load weights into modules that are adapted in the same way as those that were saved.

    Raises:
        InputError: If a file is damaged, or holds weights that are not finite or do not fit.
    """
    for name, module in modules.items():
        path = checkpoint / f"{name}.safetensors"
        state = read_tensors(path)
        check_finite(state, f"{path} must hold finite weights")
        try:
            load_trainable_state(module, state)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the weights of a module, as `save` wrote them.

    Raises:
        InputError: If the file is missing or damaged.
    """
    try:
        return load_file(path)
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Return the path of the checkpoint after so many epochs."""
    return folder / f"epoch-{epoch:03d}"


def epochs_done(checkpoint: Path) -> int:
    """Return the number of epochs after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("epoch-"))


def latest(folder: Path) -> Path | None:
    """Return the last whole checkpoint of a run, if there is one."""
    every = [path for path in folder.glob("epoch-*") if re.fullmatch(r"epoch-\d+", path.name)]
    return max(every, default=None, key=epochs_done)
