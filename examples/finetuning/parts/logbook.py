"""What a run prints and writes down: progress, tables, and TensorBoard."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from parts import checkpoint
from renyi_kd import InfoSAMTerms

COLLAPSED = 0.05  # share of the largest entropy, log2 of the batch size
SHOWN = ("structure", "loss", "compressed_information", "distilled_information")


class Logbook:
    """Write `training.csv`, `validation.csv` and TensorBoard, and warn of a collapse.

    Args:
        options: The options of the run.
        step: How many batches the run has seen before. Rows for later batches, which were written
            after the last checkpoint, are removed.
        silent: Whether to write nothing, as is right for all processes but the main one.
    """

    def __init__(self, options: argparse.Namespace, step: int, *, silent: bool = False) -> None:
        self.options, self.step, self.silent = options, step, silent
        self.folder: Path = options.output
        self.warned = False
        self.recent: list[Tensor] = []
        if silent:
            return
        for table in self.folder.glob("*.csv"):
            keep_until(table, step)
        self.tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)

    def training(
        self, bar: tqdm, structure: Tensor, terms: InfoSAMTerms | None, learning_rate: float
    ) -> None:
        """Note the figures of a batch, and write their means over every `--log-every` batches."""
        if self.silent:
            return
        # `terms.loss` is that of InfoSAM alone. The table calls it infosam, and the sum that trains
        # loss.
        figures = {"structure": structure}
        if terms is not None:
            figures |= {"loss": structure + terms.loss, "infosam": terms.loss}
            figures |= {name: value for name, value in terms._asdict().items() if name != "loss"}
        self.step += 1
        self.recent.append(torch.stack([value.detach().float() for value in figures.values()]))
        whole = len(self.recent) == self.options.log_every
        if not whole and self.step % len(bar):
            return  # reading a figure makes the CPU wait for the GPU, so it is done rarely
        means = torch.stack(self.recent).mean(0).tolist()
        values = dict(zip(figures, means, strict=True))
        self.recent = []
        bar.set_postfix({name: f"{values[name]:.3f}" for name in SHOWN if name in values})
        self.write("training", values | {"learning_rate": learning_rate})
        entropy = values.get("teacher_relation_entropy", math.inf)
        capacity = math.log2(self.options.batch_size * self.options.processes)
        if entropy < COLLAPSED * capacity and not self.warned:
            self.warned = True
            bar.write(
                f"Warning: the teacher's relation has collapsed to {entropy:.3f} of {capacity:.1f} "
                f"bits at batch {self.step}, there is hardly anything to distil. Lower "
                "--compression-weight or raise --distillation-weight."
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
        print(f"validation: {line}")

    def result(self, best: dict[str, float], scores: dict[str, float]) -> None:
        """Print and write the scores of the best epoch on the test set."""
        if self.silent:
            return
        checkpoint.write_json(self.folder / "result.json", {"validation": best, "test": scores})
        print(f"test, epoch {best['epoch']}: IoU {scores['iou']:.4f}, Dice {scores['dice']:.4f}")
        self.tensorboard.close()

    def write(self, name: str, values: dict[str, float]) -> None:
        """Append a row to `<name>.csv`, and to TensorBoard."""
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if new:
                table.writerow(["step", *values])
            table.writerow([self.step, *values.values()])
        for key, value in values.items():
            self.tensorboard.add_scalar(f"{name}/{key}", value, self.step)
        self.tensorboard.flush()


def keep_until(table: Path, step: int) -> None:
    """Remove the rows after a step, and the last one if a kill cut it short."""
    header, *rows = table.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    if kept:
        checkpoint.write_text(table, "".join([header, *kept]))
    else:
        table.unlink()
