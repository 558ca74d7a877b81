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

from finetuning.adaptation import load_trainable_state, trainable_state

Modules = Mapping[str, nn.Module]
Others = Mapping[str, Any]  # each with `state_dict` and `load_state_dict`
EPOCH, UNFINISHED = "epoch-", ".unfinished"


def save(
    folder: Path, epoch: int, best: dict[str, float], modules: Modules, others: Others
) -> None:
    """Write `epoch-NNN`: the weights of the modules that train, and the state of everything else.

    All is written and synced under another name and then renamed, which either happens or not:
    whenever the process dies or the disk is full, earlier checkpoints are whole, and this one is
    whole or absent.

    Args:
        folder: Of the run.
        epoch: How many epochs are done.
        best: The epoch that was best so far, and its scores.
        modules: What trains, each into `<name>.safetensors`.
        others: The optimizer and what else has a state, into `state.pt`.
    """
    target = of_epoch(folder, epoch)
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
    """Load what `save` wrote; return how many epochs are done and the best so far."""
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


def of_epoch(folder: Path, epoch: int) -> Path:
    """Return where the checkpoint after that many epochs is."""
    return folder / f"{EPOCH}{epoch:03d}"


def epoch_of(checkpoint: Path) -> int:
    """Return how many epochs were done at a checkpoint."""
    return int(checkpoint.name.removeprefix(EPOCH))


def latest(folder: Path) -> Path | None:
    """Return the last whole checkpoint of a run, if there is one."""
    every = [path for path in folder.glob(f"{EPOCH}*") if path.suffix != UNFINISHED]
    return max(every, default=None, key=epoch_of)


def load_weights(checkpoint: Path, modules: Modules) -> None:
    """Load the weights of the modules, adapted as those which were saved."""
    for name, module in modules.items():
        load_trainable_state(module, load_file(checkpoint / f"{name}.safetensors"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is never seen half written."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    sync(unfinished)
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text that is never seen half written."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that is never seen half written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
