"""Relation maps of teachers and students, and how their values change over the epochs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn

from parts.data.frame import Frame
from parts.distillers.choice import relation_module
from parts.evaluation.gallery import DEVICE, Gallery, Picture
from parts.evaluation.panels import (
    colorbar,
    limits_of,
    picture_files,
    show_outline,
    show_prompt,
    show_relation,
)
from parts.figures import BLUE, PAGE, VERMILION, figure_files, show_legend, shown
from parts.models.segmenter import Segmenter
from parts.runs import checkpoint
from parts.runs.trained import load_run, load_teacher
from renyi_kd import FeatureCollector

MOST_EPOCHS = 5  # in one figure


class Map(NamedTuple):
    """A relation map without padding, (h, w), and the size of a place in pixels of the image."""

    values: Tensor
    cell: tuple[float, float]


Maps = dict[int, Map]  # by rows of the test table
WHO = ("teacher", "student")


@torch.no_grad()
def relation_maps(
    relation: nn.Module, model: Segmenter, gallery: Gallery, chosen: Collection[int]
) -> dict[int, Map]:
    """Return the relation of the mask token to each place of the embedding of chosen rows."""
    found = {}
    for batch in gallery.batches(model.to(DEVICE), chosen):
        with FeatureCollector(model) as collector:
            model(batch.images, gallery.asked(batch))
            embedding, tokens = collector.pop()
        maps = relation.to(DEVICE)(embedding.flatten(2).mT, tokens)[:, 0]
        maps = maps.unflatten(1, embedding.shape[2:]).cpu()
        for row, values, truth in zip(batch.index, maps, batch.truths, strict=True):
            if row in chosen:
                found[row] = without_padding(values, model.frame, *truth.shape)
    return found


def without_padding(values: Tensor, frame: Frame, height: int, width: int) -> Map:
    """Return the part of a map (h, w) that sees some of an image of this size."""
    cell = [frame.size / side for side in values.shape]  # in pixels of the model's input
    extent = frame.extent(height, width)
    rows, columns = (math.ceil(pixels / size) for pixels, size in zip(extent, cell, strict=True))
    return Map(values[:rows, :columns], (cell[0] * height / extent[0], cell[1] * width / extent[1]))


class Run:
    """A run with a relation module, and its teacher."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.teacher = load_teacher(folder, arguments)

    def maps(self, epoch: int, gallery: Gallery, chosen: Collection[int]) -> list[Maps]:
        """Return the maps of teacher and student by the relation module after an epoch."""
        student, options = load_run(self.folder, epoch, self.arguments)
        if not options.freeze_relation:
            options.relation_from = None  # what it became is in the checkpoint
        distiller = nn.ModuleDict({"relation": relation_module(options, student.dim)})
        weights = checkpoint.epoch_folder(self.folder, epoch)
        checkpoint.load_weights(weights, {"distiller": distiller})
        models = self.teacher, student
        return [relation_maps(distiller["relation"], model, gallery, chosen) for model in models]


def epochs_to_draw(run: Path) -> list[int]:
    """Return the numbers of up to `MOST_EPOCHS` epochs that have a checkpoint."""
    last = checkpoint.epochs_done(checkpoint.latest(run))
    kept = [i for i in range(1, last + 1) if checkpoint.epoch_folder(run, i).exists()]
    places = np.linspace(0, len(kept) - 1, min(MOST_EPOCHS, len(kept)))
    return [kept[place] for place in places.round().astype(int)]


def draw_relations(
    gallery: Gallery,
    pictures: dict[int, Picture],
    runs: dict[str, Path],
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    """Draw the maps of all runs after their best epochs, and those of the first over its epochs.

    Args:
        gallery: The test images.
        pictures: Those to draw, by their rows in the test table.
        runs: The runs that have a relation module, by their labels.
        folder: Where to write `relations`, `epochs` and `histograms`.
        arguments: Where data and weights are now, and the formats.
    """
    columns: dict[str, Maps] = {}
    loaded = {label: Run(path, arguments) for label, path in runs.items()}
    for label, run in loaded.items():
        found = run.maps(checkpoint.best_epoch(run.folder), gallery, pictures)
        columns |= {f"{label}:\n{who}": maps for who, maps in zip(WHO, found, strict=True)}
    draw_maps(pictures, columns, folder / "relations", arguments.formats)
    label, run = next(iter(loaded.items()))
    epochs = epochs_to_draw(run.folder)
    every = {epoch: run.maps(epoch, gallery, pictures) for epoch in epochs}
    draw_epochs(pictures, every, folder / "epochs", arguments.formats)
    draw_histograms(every, label, folder / "histograms", arguments.formats)


def draw_maps(
    pictures: dict[int, Picture], columns: dict[str, Maps], path: Path, formats: Sequence[str]
) -> None:
    """Draw a row for each image: the image with its prompt, and the maps of each column."""
    limits = limits_of([one.values for maps in columns.values() for one in maps.values()])
    images = [picture.rgb for picture in pictures.values()]
    names = [picture.name for picture in pictures.values()]
    titles = ["image and prompt", *columns]
    with picture_files(path, formats, images, names, titles, bar=True) as (figure, axes):
        for line, (row, picture) in zip(axes, pictures.items(), strict=True):
            show_prompt(line[0], picture.rgb, picture.prompt)
            for axis, maps in zip(line[1:], columns.values(), strict=True):
                drawn = show_relation(axis, picture.rgb, *maps[row], limits)
                show_outline(axis, picture.truth, "black")
        colorbar(figure, drawn, axes)


def draw_epochs(
    pictures: dict[int, Picture],
    every: dict[int, list[Maps]],
    path: Path,
    formats: Sequence[str],
) -> None:
    """Draw the maps of the first image, a column for each epoch, the teacher above the student."""
    row, picture = next(iter(pictures.items()))
    limits = limits_of([maps[row].values for both in every.values() for maps in both])
    titles = [f"epoch {epoch}" for epoch in every]
    images = [picture.rgb] * len(WHO)
    with picture_files(path, formats, images, WHO, titles, bar=True) as (figure, axes):
        for column, both in zip(axes.T, every.values(), strict=True):
            for axis, maps in zip(column, both, strict=True):
                drawn = show_relation(axis, picture.rgb, *maps[row], limits)
                show_outline(axis, picture.truth, "black")
        colorbar(figure, drawn, axes)


def draw_histograms(
    every: dict[int, list[Maps]], label: str, path: Path, formats: Sequence[str]
) -> None:
    """Draw how the values of all maps are distributed after each epoch."""
    values = {
        epoch: [np.concatenate([one.values.flatten() for one in maps.values()]) for maps in both]
        for epoch, both in every.items()
    }
    everything = np.concatenate([part for both in values.values() for part in both])
    bins = np.linspace(everything.min(), everything.max(), 61)
    images = len(next(iter(every.values()))[0])
    with figure_files(
        path, formats, size=(PAGE, 1.8), ncols=len(values), sharex=True, sharey=True
    ) as (figure, axes):
        for axis, (epoch, both) in zip(axes[0], values.items(), strict=True):
            axis.set_title(f"epoch {epoch}")
            handles = {}
            for who, part, color in zip(WHO, both, (VERMILION, BLUE), strict=True):
                weights = np.full(len(part), 100 / len(part))
                axis.hist(part, bins, weights=weights, histtype="step", color=color)
                handles[f"{shown(label)}: {who}"] = Line2D([], [], color=color)
        axes[0, 0].set_ylabel(f"places of\n{images} images [%]")
        figure.supxlabel("relation (the values of a map have length 1)", fontsize=8)
        show_legend(figure, handles)
