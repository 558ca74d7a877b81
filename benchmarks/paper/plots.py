"""The figures of the paper that are plots of scores: 4, 6 and 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from parts.figures import BAND, COLUMN, LINES, PAGE, figure_files, show_legend, shown

Measured = Mapping[str, Mapping[tuple[str, str], Sequence[float]]]


METRICS = {"iou": "IoU", "s_measure": "S-measure"}


def draw(figure: str, found: Measured, path: Path) -> None:
    """Draw a figure from what was measured of each row, by data set and metric.

    Args:
        figure: The paper's name of the figure.
        found: The values of all seeds in percent.
        path: The files without their endings.
    """
    {"figure4": teachers, "figure6": weights, "figure7": boundaries}[figure](found, path)


def teachers(found: Measured, path: Path) -> None:
    """Draw the scores of distillers with larger teachers, a panel for each data set."""
    keys, names = keys_of(found), [*found]
    size = PAGE, 0.9 + 0.2 * len(names)
    with figure_files(path, size=size, ncols=len(keys), sharey=True) as (figure, axes):
        for panel, key in zip(axes[0], keys, strict=True):
            measured = [(place, found[name][key]) for place, name in enumerate(names)]
            places, values = zip(*((place, v) for place, v in measured if v), strict=True)
            errors = [error_of(value) for value in values]
            panel.errorbar([*map(mean, values)], places, xerr=errors, fmt="o", capsize=2)
            panel.set_title(key[0])
            panel.set_xlabel(title(key[1]))
            panel.grid(axis="x")
        axes[0, 0].set_yticks(range(len(names)), map(shown, names))
        axes[0, 0].invert_yaxis()
        show_legend(figure, {"mean ± standard error over seeds": panel.containers[0]})


def weights(found: Measured, path: Path) -> None:
    """Draw a heat map of the scores over both weights of the loss, one for each data set."""
    pairs = {name: tuple(name.split(", ")) for name in found}
    first = sorted({pair[0] for pair in pairs.values()}, key=float)
    second = sorted({pair[1] for pair in pairs.values()}, key=float)
    keys = keys_of(found)
    size = (COLUMN, 2.9) if len(keys) == 1 else (PAGE, 2.6)
    with figure_files(path, size=size, ncols=len(keys)) as (_, axes):
        for panel, key in zip(axes[0], keys, strict=True):
            grid = np.full((len(first), len(second)), np.nan)
            for name, (one, two) in pairs.items():
                if found[name].get(key):
                    grid[first.index(one), second.index(two)] = mean(found[name][key])
            panel.imshow(grid, origin="lower")
            for (i, j), value in np.ndenumerate(grid):
                dark = value < np.nanmean([np.nanmin(grid), np.nanmax(grid)])
                colour = "white" if dark else "black"
                text = "" if np.isnan(value) else f"{value:.1f}"
                panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
            panel.spines[:].set_visible(False)
            panel.set_xticks(range(len(second)), second)
            panel.set_yticks(range(len(first)), first)
            panel.set(xlabel="weight of distillation, λ₂", title=f"{key[0]}, {title(key[1])}")
        axes[0, 0].set_ylabel("weight of compression, λ₁")


def boundaries(found: Measured, path: Path) -> None:
    """Draw the F1 score of the boundary over the distance that counts as right."""
    with figure_files(path, size=(COLUMN, 2.9)) as (figure, axes):
        panel, handles = axes[0, 0], {}
        for (name, values), look in zip(found.items(), LINES, strict=False):
            keys = [key for key in keys_of(found) if values.get(key)]
            pixels = [int(metric.rpartition("_")[2]) for _, metric in keys]
            means = np.array([mean(values[key]) for key in keys])
            errors = np.array([error_of(values[key]) for key in keys])
            (handles[name],) = panel.plot(pixels, means, marker="o", **look)
            band = means - errors, means + errors
            panel.fill_between(pixels, *band, color=look["color"], alpha=0.25, linewidth=0)
        panel.set(xlabel="tolerated distance [pixels]", ylabel="boundary F1 [%]", xticks=range(4))
        panel.grid()
        show_legend(figure, handles, BAND)


def keys_of(found: Measured) -> list[tuple[str, str]]:
    """Return the data sets and metrics that the figure has."""
    return sorted({key for values in found.values() for key in values})


def error_of(values: Sequence[float]) -> float:
    """Return the standard error, or 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def title(metric: str) -> str:
    """Return the name of a metric with its unit."""
    return f"{METRICS.get(metric, metric)} [%]"
