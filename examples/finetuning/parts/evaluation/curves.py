"""What runs have written down while they trained, as curves over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from numpy.typing import NDArray
from scipy.stats import sem

from parts.data.tables import read_rows
from parts.errors import InputError
from parts.figures import BAND, LINES, PAGE, figure_files, show_legend, shown
from parts.options import DISTILLERS

Curve = dict[int, float]  # values by steps
# The table and the column of each quantity, its name with its unit, and the factor to that unit.
QUANTITIES = {
    ("training", "structure"): ("loss of\nthe masks", 1),
    ("training", "points"): ("loss at points", 1),
    **{("training", name): (f"loss of\n{name}", 1) for name in DISTILLERS},
    ("training", "compressed_information"): ("compressed\ninformation [bits]", 1),
    ("training", "distilled_information"): ("distilled\ninformation [bits]", 1),
    ("training", "teacher_relation_entropy"): ("teacher's relation\nentropy [bits]", 1),
    ("training", "student_relation_entropy"): ("student's relation\nentropy [bits]", 1),
    ("training", "relation_cosine"): ("cosine of\nthe relations", 1),
    ("validation", "iou"): ("validation\nIoU [%]", 100),
    ("validation", "dice"): ("validation\nDice [%]", 100),
}
COLUMNS = 3


def draw_curves(groups: dict[str, list[Path]], path: Path, formats: Sequence[str]) -> None:
    """Draw each quantity that a run has on axes of its own, with a line for each label.

    Args:
        groups: The runs of each label. Of several, the line is their mean, and the band around it
            is one standard error wide to each side.
        path: The files without their endings.
        formats: The endings.

    Raises:
        InputError: If a table is missing or damaged, or if the runs of a label have no step in
            common.
    """
    tables = {label: [read_tables(run) for run in runs] for label, runs in groups.items()}
    there = {name for runs in tables.values() for table in runs for name in table}
    names = [name for name in QUANTITIES if name in there]
    rows = math.ceil(len(names) / COLUMNS)
    size = PAGE, 1.45 * rows + 0.3
    with figure_files(path, formats, size=size, nrows=rows, ncols=COLUMNS) as (figure, axes):
        handles: dict[str, Artist] = {}
        banded = False
        for axis, name in zip(axes.flat, names, strict=False):
            title, factor = QUANTITIES[name]
            axis.set(xlabel="training step", ylabel=title)
            axis.grid()
            for place, (label, runs) in enumerate(tables.items()):
                curves = [table[name] for table in runs if name in table]
                if not curves:
                    continue
                steps, mean, error = mean_and_error(curves, label)
                mean, error, look = factor * mean, factor * error, LINES[place % len(LINES)]
                text = f"{shown(label)} ({len(runs)} runs)" if len(runs) > 1 else shown(label)
                (handles[text],) = axis.plot(steps, mean, **look)
                if len(curves) > 1:
                    band = mean - error, mean + error
                    axis.fill_between(steps, *band, color=look["color"], alpha=0.25, linewidth=0)
                    banded = True
        for axis in axes.flat[len(names) :]:
            axis.remove()
        show_legend(figure, handles, BAND if banded else None)


def mean_and_error(
    curves: list[Curve], label: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps that all curves have, and there their mean and its standard error.

    Raises:
        InputError: If there is no such step.
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        raise InputError(f"the runs labelled {label} must have steps in common, they have none")
    values = np.array([[curve[step] for step in steps] for curve in curves])
    if len(curves) == 1:
        return np.array(steps), values[0], np.zeros(len(steps))
    return np.array(steps), values.mean(0), sem(values)


def read_tables(run: Path) -> dict[tuple[str, str], Curve]:
    """Return the columns of the tables of a run, each as its values by steps.

    Raises:
        InputError: If a table is missing or damaged.
    """
    found: dict[tuple[str, str], Curve] = {}
    for name in dict.fromkeys(name for name, _ in QUANTITIES):
        path = run / f"{name}.csv"
        rows = [row for _, row in read_rows(path, ("step",))]
        try:
            for row in rows:
                step = int(row["step"])
                for column, cell in row.items():
                    found.setdefault((name, column), {})[step] = float(cell)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged, its cells must be numbers: {error}") from error
    return found
