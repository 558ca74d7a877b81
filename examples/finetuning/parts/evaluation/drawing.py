"""Pictures of what runs have learnt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from parts.data.check import read_data
from parts.errors import InputError
from parts.evaluation.curves import draw_curves
from parts.evaluation.gallery import DEVICE, Chosen, Gallery, Picture, extremes
from parts.evaluation.panels import (
    picture_files,
    show_mask,
    show_note,
    show_outline,
    show_prompt,
)
from parts.evaluation.relations import draw_relations
from parts.figures import BLUE, ORANGE
from parts.files import appearing, refuse_existing
from parts.models.segmenter import Segmenter
from parts.options import WITH_RELATION, next_command
from parts.runs.folder import check_digests, digest_of_data, read_options
from parts.runs.trained import load_run

Models = list[tuple[str, Segmenter]]  # with their titles


def draw(arguments: argparse.Namespace) -> None:
    """Draw all figures, and let their folder appear when all of them are there.

    Raises:
        InputError: If something is where the figures would be, or if a run cannot be used.
    """
    refuse_existing([arguments.output])
    groups = by_label(arguments.runs, arguments.labels)
    firsts = {label: runs[0] for label, runs in groups.items()}
    if arguments.by == "difference" and len(firsts) < 2:
        raise InputError(f"--by difference needs runs of two labels, got {', '.join(firsts)}")
    before, options = load_run(arguments.runs[0], 0, arguments)
    splits, report = read_data(options)
    for run in arguments.runs:
        check_digests(run, read_options(run, arguments).digests, digest_of_data(report))
    gallery = Gallery(splits["test"], options)
    last = len(gallery.rows) - 1
    if not set(arguments.rows or ()) <= set(range(last + 1)):
        raise InputError(f"--rows must be from 0 to {last}, got {arguments.rows}")
    models: Models = [("before training", before)]
    related = {}
    for label, run in firsts.items():
        model, own = load_run(run, None, arguments)
        models.append((label, model))
        if own.distiller in WITH_RELATION:
            related[label] = run
    for _, model in models:
        model.to(DEVICE)
    with appearing(arguments.output) as folder:
        folder.mkdir()
        draw_curves(groups, folder / "curves", arguments.formats)
        ious = [gallery.ious(model, title) for title, model in models]
        pictures = gallery.pictures(before, choose(ious, arguments))
        masks = [gallery.masks(model, pictures) for _, model in models]
        titles = [title for title, _ in models]
        draw_predictions(pictures, titles, masks, ious, folder / "predictions", arguments.formats)
        if related:
            draw_relations(gallery, pictures, related, folder, arguments)
    print(*sorted(arguments.output.iterdir()), sep="\n")
    print(next_command("export.py", arguments.runs[0], "model.pth"))


def by_label(runs: Sequence[Path], labels: Sequence[str] | None) -> dict[str, list[Path]]:
    """Return the runs of each label; without labels, each run has its own name.

    Raises:
        InputError: If a run is given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError(f"each run must be given once, got {', '.join(map(str, runs))}")
    if labels is None:
        names = [run.resolve().name for run in runs]
        labels = names if len(set(names)) == len(names) else [str(run) for run in runs]
    groups: dict[str, list[Path]] = {}
    for run, label in zip(runs, labels, strict=True):
        groups.setdefault(label, []).append(run)
    return groups


def choose(ious: list[list[float]], arguments: argparse.Namespace) -> Chosen:
    """Return the rows to draw: those that are asked for, or the best, the median and the worst.

    Args:
        ious: The IoU of each row, of the model before training and of a run of each label.
        arguments: Which rows are asked for, or by what they are ranked and how many there are.
    """
    if arguments.rows:
        return {row: f"row {row}" for row in arguments.rows}
    if arguments.by == "iou":
        return extremes(ious[1], arguments.each)
    gains = 100 * np.subtract(ious[1], ious[2])
    found = extremes(gains, arguments.each)
    points = {row: f"{gains[row]:+.1f} points".replace("-", "\N{MINUS SIGN}") for row in found}
    return {row: f"{name}\n{points[row]}" for row, name in found.items()}


def draw_predictions(
    pictures: dict[int, Picture],
    titles: Sequence[str],
    masks: Sequence[dict[int, Tensor]],
    ious: Sequence[Sequence[float]],
    path: Path,
    formats: Sequence[str],
) -> None:
    """Draw a row for each image: the image with its prompt, the truth, the mask of each model.

    Args:
        pictures: The images, by their rows in the test table.
        titles: The names of the models.
        masks: Of each model, the mask of each image.
        ious: Of each model, the IoU of all rows of the test table.
        path: The files without their endings.
        formats: The endings.
    """
    headings = [
        f"{title}\nmean IoU {100 * np.mean(values):.1f}\N{NO-BREAK SPACE}%"
        for title, values in zip(titles, ious, strict=True)
    ]
    headings = ["image and prompt", "truth", *headings]
    images = [picture.rgb for picture in pictures.values()]
    names = [picture.name for picture in pictures.values()]
    with picture_files(path, formats, images, names, headings) as (_, axes):
        for line, (row, picture) in zip(axes, pictures.items(), strict=True):
            show_prompt(line[0], picture.rgb, picture.prompt)
            show_mask(line[1], picture.rgb, picture.truth, ORANGE)
            for axis, found, values in zip(line[2:], masks, ious, strict=True):
                show_mask(axis, picture.rgb, found[row], BLUE)
                show_outline(axis, picture.truth)
                show_note(axis, f"IoU {100 * values[row]:.1f} %")
