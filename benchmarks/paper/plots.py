"""The figures of the paper that are plots of scores: 4, 6 and 7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Measured = Mapping[str, Mapping[tuple[str, str], Sequence[float]]]


METRICS = {"iou": "IoU", "s_measure": "S-measure"}


def draw(figure: str, found: Measured, path: Path) -> None:
    """Draw a figure from what was measured of each row, by data set and metric."""
    {"figure4": teachers, "figure6": weights, "figure7": boundaries}[figure](found, path)


def teachers(found: Measured, path: Path) -> None:
    """Draw the scores of distillers with larger teachers, a panel for each data set."""
    keys = keys_of(found)
    figure, axes = plt.subplots(1, len(keys), figsize=(4.5 * len(keys), 3.2), squeeze=False)
    for panel, key in zip(axes[0], keys, strict=True):
        names = [name for name in found if found[name].get(key)]
        values = [found[name][key] for name in names]
        errors = [error_of(value) for value in values]
        panel.errorbar(range(len(names)), list(map(mean, values)), errors, fmt="o", capsize=3)
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right")
        panel.set_title(title(key))
    save(figure, path)


def weights(found: Measured, path: Path) -> None:
    """Draw a heat map of the scores over both weights of the loss, one for each data set."""
    pairs = {name: tuple(name.split(", ")) for name in found}
    first = sorted({pair[0] for pair in pairs.values()}, key=float)
    second = sorted({pair[1] for pair in pairs.values()}, key=float)
    keys = keys_of(found)
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3.4), squeeze=False)
    for panel, key in zip(axes[0], keys, strict=True):
        grid = np.full((len(first), len(second)), np.nan)
        for name, (one, two) in pairs.items():
            if found[name].get(key):
                grid[first.index(one), second.index(two)] = mean(found[name][key])
        panel.imshow(grid, origin="lower")
        for (i, j), value in np.ndenumerate(grid):
            dark = value < np.nanmean([np.nanmin(grid), np.nanmax(grid)])
            colour = "white" if dark else "black"
            panel.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
        panel.set_xticks(range(len(second)), second)
        panel.set_yticks(range(len(first)), first)
        panel.set_xlabel("λ₂, of distillation")
        panel.set_ylabel("λ₁, of compression")
        panel.set_title(title(key))
    save(figure, path)


def boundaries(found: Measured, path: Path) -> None:
    """Draw the F1 score of the boundary over the distance that counts as right."""
    figure, panel = plt.subplots(figsize=(5, 3.6))
    for name, values in found.items():
        keys = [key for key in keys_of(found) if values.get(key)]
        pixels = [int(metric.rpartition("_")[2]) for _, metric in keys]
        scores = [values[key] for key in keys]
        panel.errorbar(pixels, list(map(mean, scores)), list(map(error_of, scores)), label=name)
    panel.set_xlabel("distance in pixels")
    panel.set_ylabel("boundary F1, %")
    panel.set_xticks(range(4))
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def keys_of(found: Measured) -> list[tuple[str, str]]:
    """Return the data sets and metrics that the figure has."""
    return sorted({key for values in found.values() for key in values})


def error_of(values: Sequence[float]) -> float:
    """Return the standard error, or 0 of a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def title(key: tuple[str, str]) -> str:
    """Return the heading of a panel."""
    return f"{key[0]}, {METRICS.get(key[1], key[1])}, %"


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure, and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
