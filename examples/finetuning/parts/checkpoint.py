"""Checkpoints that a kill cannot spoil, and that training resumes from exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from parts.adaptation import load_trainable_state, trainable_state

Modules = Mapping[str, nn.Module]
Others = Mapping[str, Any]  # objects with `state_dict` and `load_state_dict`
EPOCH, UNFINISHED = "epoch-", ".unfinished"


def save(
    folder: Path, epoch: int, best: dict[str, float], modules: Modules, others: Others
) -> None:
    """Write the folder `epoch-NNN` with trained weights and the state of everything else.

    The folder is written under another name, brought to the disk, and then renamed, which happens
    completely or not at all. Whenever the process is killed, or the disk is full, this checkpoint
    is either whole or absent, and the earlier ones are whole.

    Args:
        folder: The folder of the run.
        epoch: The number of epochs that are done.
        best: The best epoch so far, and its scores.
        modules: The modules by name. What trains of each is written to `<name>.safetensors`.
        others: The optimiser and whatever else has a state, by name. They go to `state.pt`.
    """
    target = epoch_folder(folder, epoch)
    unfinished = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    state = {name: other.state_dict() for name, other in others.items()}
    try:
        unfinished.mkdir()
        for name, module in modules.items():
            weights = {k: v.contiguous().cpu() for k, v in trainable_state(module).items()}
            save_file(weights, unfinished / f"{name}.safetensors")
        torch.save({"epoch": epoch, "best": best, **state}, unfinished / "state.pt")
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(target)
    sync(folder)


def resume(checkpoint: Path, modules: Modules, others: Others) -> tuple[int, dict[str, float]]:
    """Load what `save` wrote; return the number of epochs that are done, and the best so far."""
    load_weights(checkpoint, modules)
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    for name, other in others.items():
        other.load_state_dict(state[name])
    return state["epoch"], state["best"]


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Return the path of the checkpoint after so many epochs."""
    return folder / f"{EPOCH}{epoch:03d}"


def epochs_done(checkpoint: Path) -> int:
    """Return the number of epochs after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(EPOCH))


def latest(folder: Path) -> Path | None:
    """Return the last whole checkpoint of a run, if there is one."""
    every = [path for path in folder.glob(f"{EPOCH}*") if path.suffix != UNFINISHED]
    return max(every, default=None, key=epochs_done)


def load_weights(checkpoint: Path, modules: Modules) -> None:
    """Load weights into modules that are adapted in the same way as those that were saved."""
    for name, module in modules.items():
        load_trainable_state(module, load_file(checkpoint / f"{name}.safetensors"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees it half written."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    sync(unfinished)
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees it half written."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that nobody ever sees it half written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
