"""The folder of a run: what was asked for, whether it may go on, and what it was made of.

A run knows its data and its weights by their contents and not by their paths, so that they may lie
elsewhere when it goes on or is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from parts import files
from parts.errors import InputError
from parts.options import MODELS, SMALL_TRANSFORMERS
from parts.runs.checkpoint import epochs_done, latest

# The options with the name of a model, and with its weights.
STUDENT, TEACHER = ("model", "checkpoint"), ("teacher", "teacher_checkpoint")
# Where something is, which may change as long as the contents do not. With transformers, the name
# of a model may be that of a folder.
PLACES = ("data", "images", "masks", "checkpoint", "teacher_checkpoint", "teacher_cache")
# What is not remembered, as it has no influence on the result.
FORGOTTEN = ("output", "resume", "threads", "workers", "cpu", "log_every")
# What a call that did not come to a checkpoint may have left.
TRACES = ("options.json", "training.csv", "validation.csv", "tensorboard")
# The values of options that are younger than some runs.
LATER: dict[str, Any] = {
    "checkpoint": None,
    "digests": {},
    "foreground": [],
    "ignore": [],
    "image_range": None,
    "no_infosam": False,
    "teacher": None,
    "teacher_checkpoint": None,
}
# Without these, a run is of no use.
NEEDED = {"package", "model", "method", "rank", "targets", "seed", "batch_size", "epochs"}
NEEDED |= {"data", "images", "masks", "test_table", "eval_prompts", "eval_points", "alpha"}
WRONG = {
    "data": "the images and masks for training and validation are not those of the run: with "
    "others, some that it has been trained on may be tested",
    "checkpoint": "--checkpoint must be the one that the run started from",
    "teacher_checkpoint": "--teacher-checkpoint must be that of the run's teacher",
    "model": "--model must hold the weights that the run started from",
    "teacher": "--teacher must hold the weights of the run's teacher",
}


class Start(NamedTuple):
    """How a run starts."""

    checkpoint: Path | None  # to go on from, if there is one
    made: list[Path]  # the folders that were made for it, the innermost first


def places(options: argparse.Namespace) -> list[str]:
    """Return which options say where something is."""
    names = () if options.package in MODELS else ("model", "teacher")
    return [*PLACES, *(n for n in names if getattr(options, n) not in SMALL_TRANSFORMERS)]


def digest_of_weights(options: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    """Return names for the contents of weights that these options say the places of."""
    found = {}
    for name in names:
        value = getattr(options, name)
        if value is None or name not in places(options):
            continue
        path = Path(value)
        if path.is_dir():
            weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
            parts = [files.digest(part) for part in (path / "config.json", *weights)]
            found[name] = hashlib.sha256("".join(parts).encode()).hexdigest()
        else:
            found[name] = files.digest(path)
    return found


def check_digests(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raise `InputError` if what was found has other contents than what the run was made of."""
    # The runs of an older version have no digests.
    wrong = [name for name in found if expected and expected.get(name) != found[name]]
    if wrong:
        raise InputError(WRONG[wrong[0]])


def check_weights(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise `InputError` if weights are not there any more, or if they are others."""
    for name in set(names) & set(places(options)):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise InputError(f"{path} is not there any more; say by {flag(name)} where it is")
    check_digests(options.digests, digest_of_weights(options, names))


def read_options(folder: Path, given: argparse.Namespace | None = None) -> argparse.Namespace:
    """Return the options of a run; those that are places come as `Path`.

    Args:
        folder: The folder of the run.
        given: Where data and weights are now, as `add_moved` of the options has it.

    Raises:
        InputError: If the folder holds no run, or if it has no use for a place that is given.
    """
    path = folder / "options.json"
    if not path.exists():
        raise InputError(f"{folder} must hold a run, and has no options.json")
    content = files.read_json(path)
    if not isinstance(content, dict) or not content.keys() >= NEEDED:
        raise InputError(f"{path} is damaged, it must have {', '.join(sorted(NEEDED))}")
    options = argparse.Namespace(**LATER | content)
    for name in places(options):
        value = getattr(options, name)
        setattr(options, name, None if value is None else Path(value))
    for name, value in vars(given or argparse.Namespace()).items():
        place = name.removeprefix("moved_")
        if place == name or value is None:
            continue
        if place not in places(options) or getattr(options, place) is None:
            raise InputError(f"{flag(place)} was not given to the run {folder}")
        setattr(options, place, value)
    return options


def flag(name: str) -> str:
    """Return how an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


def remembered(options: argparse.Namespace) -> dict[str, Any]:
    """Return what options.json has of the options."""
    asked = {name: value for name, value in vars(options).items() if name not in FORGOTTEN}
    return json.loads(json.dumps(asked, default=str))


def check_output(options: argparse.Namespace) -> None:
    """Check that the folder for a run is free, or that the run in it may go on as it is asked.

    Raises:
        InputError: If the folder holds something else than a run, a finished run, or a run that was
            started with other options.
    """
    folder: Path = options.output
    path = folder / "options.json"
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--output must be a new or empty folder, got {folder}")
        return
    begun = latest(folder) is not None
    if not options.resume:
        how = "Go on with" if begun else "It has no checkpoint. Start it anew with"
        raise InputError(f"{folder} holds a run. {how} --resume, or name another --output.")
    if not begun:
        return
    before, asked = LATER | files.read_json(path), remembered(options)
    if options.epochs < before["epochs"]:
        raise InputError(f"--epochs may grow, was {before['epochs']}, is {options.epochs}")
    if (folder / "result.json").exists() and options.epochs == before["epochs"]:
        raise InputError(
            f"{folder} holds a finished run, see result.json there. More --epochs than "
            f"{options.epochs} would go on with it."
        )
    free = {*places(options)} & {*places(argparse.Namespace(**before))}
    fixed = (asked.keys() | before.keys()) - free - {"epochs", "digests"}
    changed = sorted(name for name in fixed if asked.get(name) != before.get(name))
    if changed:
        lines = [f"{flag(name)} was {before.get(name)}, is {asked.get(name)}" for name in changed]
        raise InputError(f"--resume must go on with the same options: {'; '.join(lines)}")


def start(options: argparse.Namespace) -> Start:
    """Write what is asked for into the folder of a run, which may have a checkpoint to go on from.

    Raises:
        InputError: If the folder cannot be used, or if its run had other data or weights.
    """
    check_output(options)
    options.digests |= digest_of_weights(options, (*STUDENT, *TEACHER))
    folder: Path = options.output
    path, last = folder / "options.json", latest(folder)
    if last is not None:
        before = files.read_json(path).get("digests", {})
        check_digests(before, dict.fromkeys(before, "") | options.digests)
        if epochs_done(last) < options.epochs:
            (folder / "result.json").unlink(missing_ok=True)  # that of fewer epochs
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"*{files.UNFINISHED}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    files.replace_json(path, remembered(options))
    return Start(last, made)


def undo_start(folder: Path, made: list[Path]) -> None:
    """Remove what a call left that did not come to its first checkpoint."""
    if latest(folder) is not None:
        return
    for name in TRACES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for place in made:
        files.remove_if_empty(place)
