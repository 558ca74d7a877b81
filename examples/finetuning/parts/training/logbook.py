"""What a run prints and writes down: progress, tables, and what the trackers get of them."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from torch import Tensor
from tqdm import tqdm

from parts import files
from parts.data.tables import Row
from parts.errors import InputError, first_line
from parts.runs.folder import settings
from parts.training.processes import raise_if_any

COLLAPSED = 0.05  # share of the largest entropy, log2 of the batch size
TABLES = ("training", "validation")
# A gradient scaler starts at 2 ** 16, and halves when it skips a step. It can do so this often
# until it does not scale any more.
SKIPPED_STEPS = 16


class Logbook:
    """Write `training.csv` and `validation.csv`, tell the trackers, and look at the figures.

    The tables are written by hand, as no tracker takes back what a resumed run writes again.

    A collapse of the teacher's relation is reported. A loss that is not finite ends the run.

    Args:
        options: The options of the run.
        rows: The images of training.
        batches: How many batches an epoch has.
        step: How many batches the run has seen before. Rows for later batches, which were written
            after the last checkpoint, are removed.
        scaled: Whether a gradient scaler skips steps whose gradients are not finite.
        silent: Whether to write nothing, as is right for all processes but the main one.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        rows: Sequence[Row],
        batches: int,
        step: int = 0,
        *,
        scaled: bool = False,
        silent: bool = False,
    ) -> None:
        self.options, self.rows, self.batches, self.step = options, rows, batches, step
        self.folder: Path = options.output
        self.tolerated, self.silent = SKIPPED_STEPS if scaled else 0, silent
        self.skipped = 0
        self.warned = False
        self.recent: list[tuple[Tensor, list[int]]] = []
        if silent:
            return
        for name in TABLES:
            keep_until(self.folder / f"{name}.csv", step)
        self.trackers = start_trackers(options, step)
        self.bar = tqdm(total=options.epochs * batches, initial=step, ncols=80)

    def training(self, index: list[int], figures: dict[str, Tensor], learning_rate: float) -> None:
        """Note the figures of a batch, and write their means over every `--log-every` batches.

        Args:
            index: Rows of the table of images.
            figures: The losses, the one that trains as `loss`, and what else is worth a column.
            learning_rate: That of the step.

        Raises:
            InputError: If a loss is not finite on any process.
        """
        self.step += 1
        self.recent.append(
            (torch.stack([value.detach().float() for value in figures.values()]), index)
        )
        whole = len(self.recent) == self.options.log_every or self.step % self.batches == 0
        if not self.silent:
            self.bar.set_description(f"epoch {self.epoch}/{self.options.epochs}", refresh=False)
            self.bar.update()
        if not whole:
            return  # reading a figure makes the CPU wait for the GPU, so it is done rarely
        read = torch.stack([values for values, _ in self.recent])
        losses = dict(zip(figures, read.T.tolist(), strict=True))
        problem = self.not_finite(losses, [index for _, index in self.recent])
        self.recent = []
        raise_if_any(problem)
        if self.silent:
            return
        values = dict(zip(figures, read.mean(0).tolist(), strict=True))
        shown = values.get("loss", next(iter(values.values())))
        self.bar.set_postfix(loss=f"{shown:.4g}", refresh=False)
        self.write("training", values | {"learning_rate": learning_rate})
        self.warn_of_collapse(values.get("teacher_relation_entropy", math.inf))

    @property
    def epoch(self) -> int:
        """The number of the epoch that the last batch was in, from 1."""
        return (self.step - 1) // self.batches + 1

    def not_finite(self, figures: dict[str, list[float]], images: list[list[int]]) -> str | None:
        """Return what to say if a loss of the last batches is not finite, in the order of them."""
        for i, index in enumerate(images):
            wrong = [
                name
                for name in ("structure", "points", "load", "start", self.options.distiller, "loss")
                if name in figures and not math.isfinite(figures[name][i])
            ]
            self.skipped = self.skipped + 1 if wrong else 0
            if self.skipped <= self.tolerated:
                continue
            step = self.step - len(images) + i
            epoch, batch = step // self.batches + 1, step % self.batches + 1
            names = ", ".join(str(self.rows[row].image) for row in index)
            before = f", and before it {self.tolerated} others" if self.tolerated else ""
            return (
                f"the {wrong[0]} loss of epoch {epoch}, batch {batch}, is {figures[wrong[0]][i]:g}"
                f"{before}. Train with a smaller --lr or other weights of the losses, or look at "
                f"the images of this batch: {names}"
            )
        return None

    def warn_of_collapse(self, entropy: float) -> None:
        """Print once that the teacher's relation has hardly any entropy left."""
        capacity = math.log2(self.options.batch_size * self.options.processes)
        if entropy < COLLAPSED * capacity and not self.warned:
            self.warned = True
            tqdm.write(
                f"Warning: the teacher's relation is nearly the same for all images of a batch "
                f"({entropy:.3f} of {capacity:.1f} bits at batch {self.step}), so that there is "
                "hardly anything to distil. Lower --compression-weight if it stays so."
            )

    def validation(self, epoch: int, scores: dict[str, float], seconds: float) -> None:
        """Print and write the scores of an epoch."""
        if self.silent:
            return
        values = {"epoch": epoch, **scores, "seconds_per_batch": seconds}
        if torch.cuda.is_available():
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.write("validation", values)
        line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"validation: {line}")

    def result(self, best: dict[str, float], scores: dict[str, float]) -> None:
        """Print and write the scores of the best epoch on the test set."""
        if self.silent:
            return
        files.replace_json(self.folder / "result.json", {"validation": best, "test": scores})
        tqdm.write(
            f"test, epoch {best['epoch']}: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f}"
        )

    def close(self) -> None:
        """End the progress bar and the trackers."""
        if not self.silent:
            self.bar.close()
            for tracker in self.trackers:
                tracker.finish()

    def write(self, name: str, values: dict[str, float]) -> None:
        """Append a row to `<name>.csv`, and give it to the trackers."""
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(["step", *values])
            table.writerow([self.step, *values.values()])
        named = {f"{name}/{key}": value for key, value in values.items()}
        for tracker in self.trackers:
            tracker.log(named, step=self.step)


def check_trackers(options: argparse.Namespace) -> None:
    """Raise `InputError` if the package of a tracker is not installed."""
    for name in options.track:
        if find_spec(name) is None:
            raise InputError(
                f"--track {name} needs the package {name}; install it with `pip install {name}`, "
                "or leave it out"
            )


def start_trackers(options: argparse.Namespace, step: int) -> list[GeneralTracker]:
    """Return the trackers that were asked for, which go on after a step.

    The project is named after the folder that the run is in, and the run after its own.

    Raises:
        InputError: If a tracker does not start, as one that needs an account may not.
    """
    project, name = options.output.parent.name or "runs", options.output.name
    about = {"name": name, "config": settings(options)}
    kinds = {
        "tensorboard": TensorBoardTracker("tensorboard", options.output, purge_step=step + 1),
        "wandb": WandBTracker(project, dir=options.output, **about),
        "trackio": TrackioTracker(project, resume="allow" if step else "never", **about),
    }
    trackers = [kinds[name] for name in dict.fromkeys(options.track)]
    try:
        for tracker in trackers:
            tracker.start()
    except Exception as error:  # each raises errors of its own types
        raise InputError(f"--track {tracker.name}: {first_line(error)}") from error
    return trackers


def check_tables(options: argparse.Namespace) -> None:
    """Raise `InputError` if a table of a run is damaged."""
    for name in TABLES:
        rows_until(options.output / f"{name}.csv", 0)


def keep_until(table: Path, step: int) -> None:
    """Remove the rows after a step, and the last one if a kill cut it short.

    Raises:
        InputError: If a row is damaged.
    """
    header, kept = rows_until(table, step)
    if kept:
        files.replace(table, "".join([header, *kept]))
    else:
        table.unlink(missing_ok=True)


def rows_until(table: Path, step: int) -> tuple[str, list[str]]:
    """Return the first line of a table, and its whole rows up to a step."""
    if not table.exists():
        return "", []
    try:
        header, *rows = table.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        whole = [row for row in rows if row.endswith("\n")]
        return header, [row for row in whole if int(row.split(",")[0]) <= step]
    except ValueError as error:
        raise InputError(
            f"{table} is damaged, a row must start with a number: {error}. Repair it, or move it "
            "elsewhere."
        ) from error
