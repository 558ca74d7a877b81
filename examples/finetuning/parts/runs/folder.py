"""The folder of a run: what was asked for, whether it may go on, and what it was made of.

A run knows its data and its weights by their contents and not by their paths, so that they may lie
elsewhere when it goes on or is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parts import files
from parts.data.check import Report
from parts.errors import InputError
from parts.options import MODELS, SMALL_TRANSFORMERS
from parts.runs.checkpoint import epochs_done, latest
from parts.runs.recorded import FILE, read_recorded

# The options with the name of a model, and with its weights.
STUDENT, TEACHER = ("model", "checkpoint"), ("teacher", "teacher_checkpoint")
# Where something is, which may change as long as the contents do not. With transformers, the name
# of a model may be that of a folder.
PLACES = (
    "data",
    "images",
    "masks",
    "coco",
    "checkpoint",
    "teacher_checkpoint",
    "teacher_cache",
    "relation_from",
    "hq_checkpoint",
)
# What is not remembered, as it has no influence on the result.
FORGOTTEN = ("output", "resume", "threads", "workers", "cpu", "log_every", "track")
LOCK = "run.lock"
# What a new run that did not come to a checkpoint may have left.
TRACES = (FILE, "training.csv", "validation.csv", "tensorboard", "wandb", LOCK)
# What a run writes in one piece, so that a kill may leave an unfinished one.
WRITTEN = r"(options\.json|training\.csv|validation\.csv|result\.json|epoch-\d+)"
WRONG = {
    "data": "the images and masks for training and validation are not those of the run: with "
    "others, some that it has been trained on may be tested",
    "test": "the images and masks for the test are not those of the run; evaluate.py takes others "
    "by --test-table",
    "checkpoint": "--checkpoint must be the one that the run started from",
    "teacher_checkpoint": "--teacher-checkpoint must be that of the run's teacher",
    "model": "--model must hold the weights that the run started from",
    "teacher": "--teacher must hold the weights of the run's teacher",
    "relation_from": "--relation-from must be the run that this one took its relation module from, "
    "and have the same best epoch",
}


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


def digest_of_data(report: Report) -> dict[str, str]:
    """Return names for the contents of what a run trains on, and of what it is tested on."""
    return {"data": report.trained_on, "test": report.tested_on}


def check_digests(folder: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    """Raise `InputError` if what was found has other contents than what the run was made of."""
    if not expected:
        return  # the runs of an older version have no digests, and others none of the test
    known = {"test": found.get("test")} | expected
    wrong = [name for name in found if known.get(name) != found[name]]
    if wrong:
        raise InputError(f"{folder}: {WRONG[wrong[0]]}")


def check_weights(folder: Path, options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise `InputError` if weights are not there any more, or if they are others."""
    for name in set(names) & set(places(options)):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise InputError(f"{path} is not there any more; say by {flag(name)} where it is")
    check_digests(folder, options.digests, digest_of_weights(options, names))


def read_options(folder: Path, given: argparse.Namespace | None = None) -> argparse.Namespace:
    """Return the options of a run; those that are places come as `Path`.

    Args:
        folder: The folder of the run.
        given: Where data and weights are now, as `add_moved` of the options has it.

    Raises:
        InputError: If the folder holds no run, or if it has no use for a place that is given.
    """
    if not (folder / FILE).exists():
        raise InputError(f"{folder} must hold a run, and has no {FILE}")
    options = argparse.Namespace(**read_recorded(folder))
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


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is remembered of the options without any place, to be shown to others."""
    hidden = {*places(options), "digests"}
    return {name: value for name, value in remembered(options).items() if name not in hidden}


def check_output(options: argparse.Namespace) -> None:
    """Check that the folder for a run is free, or that the run in it may go on as it is asked.

    Raises:
        InputError: If the folder holds something else than a run, a finished run, or a run that was
            started with other options.
    """
    folder: Path = options.output
    if not (folder / FILE).exists():
        if folder.exists() and not is_free(folder):
            raise InputError(f"--output must be a new or empty folder, got {folder}")
        return
    before, asked = read_recorded(folder), remembered(options)
    begun = latest(folder) is not None
    if not options.resume:
        how = "Go on with" if begun else "It has no checkpoint. Start it anew with"
        raise InputError(f"{folder} holds a run. {how} --resume, or name another --output.")
    if not begun:
        return
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


def is_free(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a killed start may have left."""
    if not folder.is_dir():
        return False
    left = unfinished(folder)
    return all(
        path in left or (path.name == LOCK and path.stat().st_size == 0)
        for path in folder.iterdir()
    )


def unfinished(folder: Path) -> list[Path]:
    """Return what a killed run was writing."""
    names = re.compile(WRITTEN + files.UNFINISHED_NAME)
    return [path for path in folder.iterdir() if names.fullmatch(path.name) and path.is_dir()]


@contextmanager
def running(options: argparse.Namespace) -> Iterator[Path | None]:
    """Hold the folder of a run while it trains; yield the checkpoint to go on from, if any.

    Until `record`, nothing of an earlier run is changed. If a new run does not come to its first
    checkpoint, nothing is left of it.

    Raises:
        InputError: If the folder cannot be used, if its run had other data or weights, or if
            another process trains it.
    """
    folder: Path = options.output
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(folder / LOCK):
            check_output(options)  # again, as another process may have been here
            is_new = not (folder / FILE).exists()
            try:
                options.digests |= digest_of_weights(options, (*STUDENT, *TEACHER))
                if latest(folder) is not None:
                    before = read_recorded(folder)["digests"]
                    check_digests(folder, before, dict.fromkeys(before, "") | options.digests)
                for path in unfinished(folder):
                    shutil.rmtree(path, ignore_errors=True)
                yield latest(folder)
            finally:
                if is_new and latest(folder) is None:
                    remove_traces(folder)
    finally:
        for place in made:  # the innermost first; a folder that holds something stays
            files.remove_if_empty(place)


def record(options: argparse.Namespace) -> None:
    """Write what is asked for into the folder of a run, once nothing speaks against it."""
    last = latest(options.output)
    if last is not None and epochs_done(last) < options.epochs:
        (options.output / "result.json").unlink(missing_ok=True)  # that of fewer epochs
    files.replace_json(options.output / FILE, remembered(options))


def remove_traces(folder: Path) -> None:
    """Remove what a new run left that did not come to its first checkpoint."""
    for path in (folder / name for name in TRACES):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
