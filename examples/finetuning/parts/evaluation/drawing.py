"""Pictures of what runs have learnt."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from parts.data.batches import MaskedImages, collate
from parts.data.check import read_data
from parts.data.prompts import Prompts
from parts.data.reading import read_image, reading_of
from parts.data.tables import Row, read_rows
from parts.distillers.choice import relation_module
from parts.errors import InputError
from parts.evaluation.metrics import dice_and_iou
from parts.evaluation.scores import fixed_prompts, predictions
from parts.files import appearing, refuse_existing
from parts.models.segmenter import Segmenter
from parts.options import DISTILLERS, WITH_RELATION, next_command
from parts.runs import checkpoint
from parts.runs.folder import check_digests, digest_of_data, read_options
from parts.runs.trained import load_run, load_teacher
from renyi_kd import FeatureCollector

# Colour-blind readers can tell these apart.
BLUE, ORANGE, YELLOW, GREEN = "#0072b2", "#e69f00", "#f0e442", "#009e73"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Models = dict[Path | None, Segmenter]  # by their runs, and None for the one before training
NO_TICKS: dict[str, Any] = {"xticks": [], "yticks": []}


def draw(arguments: argparse.Namespace) -> None:
    """Draw the three pictures, and let their folder appear when all of them are there.

    Raises:
        InputError: If something is where the pictures would be, or if a run cannot be used.
    """
    refuse_existing([arguments.output])
    first = arguments.runs[0]
    before, options = load_run(first, 0, arguments)
    splits, report = read_data(options)
    for run in arguments.runs:
        check_digests(run, read_options(run, arguments).digests, digest_of_data(report))
    rows = splits["test"]
    if not set(arguments.rows or ()) <= set(range(len(rows))):
        raise InputError(f"--rows must be from 0 to {len(rows) - 1}, got {arguments.rows}")
    runs = {run: load_run(run, None, arguments)[0] for run in arguments.runs}
    models: Models = {None: before} | runs
    for model in models.values():
        model.to(DEVICE)
    with appearing(arguments.output) as folder:
        folder.mkdir()
        chosen = arguments.rows or extremes(runs[first], rows, arguments.extremes, options)
        draw_predictions(rows, chosen, models, folder / "predictions.png", options)
        if options.distiller in WITH_RELATION:
            draw_relations(first, rows[chosen[0]], folder / "relations.png", arguments)
        draw_curves(arguments.runs, folder / "curves.png")
    print(*sorted(arguments.output.glob("*.png")), sep="\n")
    print(next_command("export.py", first, "model.pth"))


def segmented(
    model: Segmenter, rows: list[Row], chosen: Iterable[int], options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor, Prompts]]:
    """Yield the mask, the truth and the prompt of each chosen image.

    The prompt is in pixels of the model's input, mask and truth are in those of the image.
    """
    asked = options.eval_prompts, options.eval_points
    data = MaskedImages(rows, model.frame, reading_of(options))
    for i in chosen:
        batch = collate([data[i]]).to(DEVICE)
        for _, logits, truth in predictions(model, [batch], *asked):
            yield (logits > 0).cpu(), truth.cpu(), fixed_prompts(*asked, batch)


def extremes(
    model: Segmenter, rows: list[Row], count: int, options: argparse.Namespace
) -> list[int]:
    """Return the images of lowest and of highest IoU, from worst to best."""
    found = segmented(model, rows, range(len(rows)), options)
    found = tqdm(found, "looking", len(rows), ncols=80)
    order = np.argsort([dice_and_iou(mask, truth)[1] for mask, truth, _ in found]).tolist()
    return order[:count] + order[max(count, len(order) - count) :]


def draw_predictions(
    rows: list[Row],
    chosen: list[int],
    models: Models,
    path: Path,
    options: argparse.Namespace,
) -> None:
    """Draw a row for each image: the image with its prompt, the truth, the mask of each model."""
    names = ("before" if run is None else shown(run) for run in models)
    titles = ["image and prompt", "truth", *names]
    figure, axes = plt.subplots(
        len(chosen),
        len(titles),
        figsize=(2.2 * len(titles), 2.2 * len(chosen) + 0.4),
        layout="constrained",
        subplot_kw=NO_TICKS,
        squeeze=False,
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    found = [[*segmented(model, rows, chosen, options)] for model in models.values()]
    for i, (line, row) in enumerate(zip(axes, chosen, strict=True)):
        image = read_image(rows[row].image, reading_of(options)).rgb
        height, width = image.shape[:2]
        for axis in line:
            axis.imshow(image)
        line[0].set_ylabel(shown(rows[row].image), fontsize=8)
        _, truth, prompt = found[0][i]
        frame = next(iter(models.values())).frame
        draw_prompt(line[0], prompt, frame.boxes(torch.ones(4), height, width))
        line[1].contourf(truth, [0.5, 1], colors=ORANGE, alpha=0.55)
        for axis, predicted in zip(line[2:], found, strict=True):
            mask = predicted[i][0]
            axis.contourf(mask, [0.5, 1], colors=BLUE, alpha=0.55)
            axis.contour(truth, [0.5], colors="white", linewidths=1)
            note = {"color": "white", "fontsize": 9, "bbox": {"fc": "black", "pad": 1.5}}
            iou = dice_and_iou(mask, truth)[1]
            axis.text(0.03 * width, 0.95 * height, f"IoU {iou:.2f}", **note)
    save(figure, path)


def draw_prompt(axis: plt.Axes, prompt: Prompts, scale: Tensor) -> None:
    """Draw a box, or dots on the object and crosses beside it.

    The prompt is in pixels of the model's input; divided by `scale` it is in those of the image.
    """
    if prompt.boxes is not None:
        x0, y0, x1, y1 = (prompt.boxes[0].cpu() / scale).tolist()
        axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, ec=YELLOW, fc="none", lw=2))
        return
    points, on = prompt.points[0].cpu() / scale[:2], prompt.labels[0].cpu() == 1
    for marker, some in (("o", points[on]), ("X", points[~on])):
        axis.scatter(*some.T, c=YELLOW, marker=marker, edgecolors="black", s=40)


@torch.no_grad()
def relation_map(
    relation: nn.Module, model: Segmenter, row: Row, options: argparse.Namespace
) -> Tensor:
    """Return the relation of the mask token to each place of the image embedding, shape (h, w)."""
    data = MaskedImages([row], model.frame, reading_of(options))
    batch = collate([data[0]]).to(DEVICE)
    model.to(DEVICE)
    with FeatureCollector(model) as collector:
        model(batch.images, Prompts(batch.boxes))
        embedding, tokens = collector.pop()
    of_tokens = relation.to(DEVICE)(embedding.flatten(2).mT, tokens)
    return of_tokens[0, 0].unflatten(0, embedding.shape[2:]).cpu()


def draw_relations(run: Path, row: Row, path: Path, arguments: argparse.Namespace) -> None:
    """Draw the maps of teacher and student after up to five epochs, with histograms below."""
    teacher, last = load_teacher(run, arguments), checkpoint.latest(run)
    epochs = np.unique(np.linspace(1, checkpoint.epochs_done(last), 5).astype(int)).tolist()
    maps = []
    for epoch in epochs:
        student, options = load_run(run, epoch, arguments)
        if not options.freeze_relation:
            options.relation_from = None  # what it became is in the checkpoint
        distiller = nn.ModuleDict({"relation": relation_module(options, student.dim)})
        checkpoint.load_weights(checkpoint.epoch_folder(run, epoch), {"distiller": distiller})
        relation = distiller["relation"]
        both = [relation_map(relation, model, row, options) for model in (teacher, student)]
        maps.append(both)
    limit = max(part.abs().max().item() for both in maps for part in both)
    figure, axes = plt.subplots(
        3, len(epochs), figsize=(2.4 * len(epochs) + 0.6, 6.6), layout="constrained", squeeze=False
    )
    bins = np.linspace(-limit, limit, 41)
    for column, epoch, both in zip(axes.T, epochs, maps, strict=True):
        column[0].set_title(f"epoch {epoch}", fontsize=10)
        for axis, part, color in zip(column, both, (GREEN, BLUE), strict=False):
            shown = axis.imshow(part.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
            axis.set(**NO_TICKS)
            column[2].hist(part.flatten(), bins, histtype="step", color=color, lw=1.5)
        column[2].set_xlabel("relation")
        column[2].sharey(axes[2, 0])
    for axis, label in zip(axes[:, 0], ("teacher", "student", "places"), strict=True):
        axis.set_ylabel(label)
    axes[2, 0].legend(["teacher", "student"], fontsize=8, frameon=False)
    figure.colorbar(shown, ax=axes[:2], shrink=0.8)
    save(figure, path)


def shown(path: Path) -> str:
    """Return the name of a file or folder as it can be drawn, with escapes if it is no UTF-8."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def read_table(path: Path) -> dict[str, list[float]]:
    """Return the columns of a table of numbers, or nothing if there is no such file."""
    rows = [row for _, row in read_rows(path, ("step",))] if path.exists() else []
    try:
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, its cells must be numbers: {error}") from error


def draw_curves(runs: list[Path], path: Path) -> None:
    """Draw losses, information and validation scores of all runs over the batches."""
    panels = {
        "loss of the masks": ("training", {"structure": "", "points": ""}),
        "distiller's loss": ("training", dict.fromkeys(DISTILLERS, "")),
        "information in bits": (
            "training",
            {"compressed_information": "compressed", "distilled_information": "distilled"},
        ),
        "entropy in bits": (
            "training",
            {"teacher_relation_entropy": "teacher", "student_relation_entropy": "student"},
        ),
        "validation": ("validation", {"iou": "IoU", "dice": "Dice"}),
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.4), layout="constrained"
    )
    colors = plt.get_cmap("cividis")(np.linspace(0, 0.85, len(runs)))
    for axis, (title, (name, columns)) in zip(axes, panels.items(), strict=True):
        axis.set(title=title, xlabel="batch")
        axis.grid(alpha=0.3)
        for run, color in zip(runs, colors, strict=True):
            table = read_table(run / f"{name}.csv")
            found = [item for item in columns.items() if item[0] in table]
            for (column, label), style in zip(found, ("-", "--"), strict=False):
                text = " ".join(filter(None, (shown(run), label)))
                axis.plot(table["step"], table[column], style, color=color, label=text)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture and close the figure, which matplotlib would keep in memory."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
