"""Masks for the prompts of a table, or for one box in every image of a folder."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks
from tqdm import tqdm

from parts.data.check import unreadable
from parts.data.prompts import Prompts
from parts.data.reading import ContentError, Reading, read_image, reading_of
from parts.data.tables import DataError, Problem, read_rows
from parts.errors import InputError
from parts.files import appearing, refuse_existing
from parts.models.segmenter import Segmenter
from parts.options import next_command
from parts.runs.folder import read_options
from parts.runs.trained import load_run

BOX, POINT = ("x0", "y0", "x1", "y1"), ("x", "y", "label")
BLUE, ORANGE, YELLOW = "#0072b2", "#e69f00", "#f0e442"  # colour-blind readers tell them apart


class Prompt(NamedTuple):
    """A box or a point, in pixels of an image."""

    source: str  # where it is from
    numbers: list[float]  # those of `BOX`, or those of `POINT`


Asked = dict[Path, list[Prompt]]  # what is asked of each image


def predict(arguments: argparse.Namespace) -> None:
    """Check all prompts, segment, and let the masks appear when all of them are there.

    Raises:
        InputError: If something is where the masks would be, or if anything is wrong with the
            prompts or the images.
    """
    outputs = [path for path in (arguments.output, arguments.overlays) if path is not None]
    refuse_existing(outputs)
    resolved = [path.resolve() for path in outputs]
    if len(outputs) == 2 and any(
        one in (other, *other.parents) for one, other in (resolved, resolved[::-1])
    ):
        raise InputError("--output and --overlays must be two folders, neither inside the other")
    reading = reading_of(read_options(arguments.run))
    if arguments.image_range is not None:
        reading = replace(reading, image_range=arguments.image_range)
    folder, asked = ask(arguments)
    check_prompts(asked, reading)
    names = mask_names(asked, folder)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_run(arguments.run, arguments.epoch, arguments)[0].to(device)
    with ExitStack() as stack:
        places = [stack.enter_context(appearing(path)) for path in outputs]
        for path, prompts in tqdm(asked.items(), "segmenting", ncols=80):
            rgb = read_image(path, reading).rgb
            masks = segment(student, rgb, prompts)
            for name, mask in zip(names[path], masks, strict=True):
                save(Image.fromarray(mask.numpy()).convert("L"), places[0] / name)
            for place in places[1:]:
                save(overlay(rgb, masks, prompts), place / names[path][0])
    print(f"{sum(map(len, names.values()))} masks: {arguments.output}")
    print(next_command("export.py", arguments.run, "model.pth"))


def ask(arguments: argparse.Namespace) -> tuple[Path, Asked]:
    """Return the folder of the images, and the prompts of each of them.

    Raises:
        InputError: If the table is wrong, or if the folder has no images.
    """
    source: Path = arguments.prompts
    if not source.is_dir():
        if arguments.box is not None and source.exists():
            raise InputError(f"--box is for all images of a folder, got the table {source}")
        folder = arguments.images or source.parent
        return folder, read_prompts(source, folder)
    if arguments.box is None:
        raise InputError(f"--box must be given for the images of a folder, got {source} alone")
    kinds = Image.registered_extensions()
    # As in training, hidden files do not count: a Mac adds them to what it copies.
    files = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in kinds]
    if not images:
        raise InputError(f"{source} must have images, got none")
    if images != files:
        print(f"{len(files) - len(images)} of {len(files)} in {source} have no image's name")
    return source, {path: [Prompt("--box", arguments.box)] for path in images}


def read_prompts(table: Path, folder: Path) -> Asked:
    """Return the prompts of a table, whose images are in a folder.

    Raises:
        InputError: If the table lacks columns, or has those of boxes and those of points.
        DataError: If cells are no finite numbers.
    """
    asked: Asked = {}
    problems = []
    for line, row in read_rows(table, ("image",)):
        kinds = [columns for columns in (BOX, POINT) if set(columns) <= row.keys()]
        if len(kinds) != 1:
            raise InputError(
                f"{table} must have columns image and either {','.join(BOX)} or {','.join(POINT)}, "
                f"got {','.join(filter(None, row))}"
            )
        (columns,) = kinds
        source = f"{table.name} {line}"
        numbers = [finite(row[column]) for column in columns]
        problems += [
            Problem("no number", f"{source}: {column} must be a finite number, got {row[column]!r}")
            for column, number in zip(columns, numbers, strict=True)
            if number is None
        ]
        if not row["image"]:
            problems.append(Problem("no image in the row", f"{source}: no image in the row"))
        asked.setdefault(folder / row["image"], []).append(Prompt(source, numbers))
    if problems:
        raise DataError(problems, what="The prompts have")
    return asked


def finite(cell: str) -> float | None:
    """Return the number in a cell of a table, or None if there is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    # Python takes 1_0 for 10.
    return number if math.isfinite(number) and "_" not in cell else None


def check_prompts(asked: Asked, reading: Reading) -> None:
    """Raise `DataError` unless all images can be read and have their prompts inside."""
    problems = []
    for path, prompts in tqdm(asked.items(), "checking the prompts", ncols=80):
        try:
            height, width, _ = read_image(path, reading).rgb.shape
        except (ContentError, OSError) as error:
            problems.append(unreadable(prompts[0].source, "image", path, error))
            continue
        for prompt in prompts:
            wrong = what_is_wrong(prompt.numbers, height, width)
            if wrong:
                problems.append(Problem(wrong[0], f"{prompt.source}: {wrong[1]}, for {path.name}"))
    if problems:
        raise DataError(problems, what="The prompts have")


def what_is_wrong(numbers: list[float], height: int, width: int) -> tuple[str, str] | None:
    """Return what is wrong with a prompt of an image, if anything is: the kind, and its words."""
    if len(numbers) == len(BOX):
        x0, y0, x1, y1 = numbers
        for low, high, names in (
            (x0, x1, "x0 must be below x1"),
            (y0, y1, "y0 must be below y1"),
        ):
            if low >= high:
                kind = "a box whose corners are not in order"
                return kind, f"{names}, got {low:g} and {high:g}"
        xs, ys = {"x0": x0, "x1": x1}, {"y0": y0, "y1": y1}
    else:
        x, y, label = numbers
        if label not in (0, 1):
            kind = "a label other than 0 and 1"
            return kind, f"label must be 1 on the object or 0 beside it, got {label:g}"
        xs, ys = {"x": x}, {"y": y}
    for places, size in ((xs, width), (ys, height)):
        for name, value in places.items():
            if not 0 <= value <= size:
                kind = "a prompt outside of its image"
                extent = f"in an image of {width} x {height} pixels"
                return kind, f"{name} must be from 0 to {size} {extent}, got {value:g}"
    return None


def mask_names(asked: Asked, folder: Path) -> dict[Path, list[Path]]:
    """Return the names of the masks of each image, relative to the folder for masks.

    The first mask of `a/b.jpg` is `a/b.png`, the second `a/b-2.png`. An image that is not in the
    folder of images has its name alone.

    Raises:
        InputError: If two masks would have the same name.
    """
    taken = dict[Path, Path]()
    names = {}
    for image, prompts in asked.items():
        # A link keeps its own name, as the rows of a table may be links to one file.
        place, root = (Path(os.path.abspath(path)) for path in (image, folder))
        stem = place.relative_to(root) if place.is_relative_to(root) else Path(place.name)
        count = len(prompts) if len(prompts[0].numbers) == len(BOX) else 1
        names[image] = [
            stem.with_name(f"{stem.stem}-{i + 1}.png" if i else f"{stem.stem}.png")
            for i in range(count)
        ]
        for name in names[image]:
            if name in taken:
                raise InputError(f"{image} and {taken[name]} would both have the mask {name}")
            taken[name] = image
    return names


@torch.no_grad()
def segment(student: Segmenter, rgb: NDArray[np.uint8], prompts: list[Prompt]) -> Tensor:
    """Return a mask for each box, or one for all points together, bool, (N, H, W), on the CPU."""
    (height, width, _), frame = rgb.shape, student.frame
    device = next(student.parameters()).device
    numbers = torch.tensor([prompt.numbers for prompt in prompts])
    if numbers.shape[1] == len(BOX):
        scaled = frame.boxes(numbers, height, width).to(device)
        each = [Prompts(box[None]) for box in scaled]
    else:
        scaled = frame.boxes(numbers[:, [0, 1, 0, 1]], height, width)[:, :2].to(device)
        each = [Prompts(points=scaled[None], labels=numbers[None, :, 2].int().to(device))]
    levels = student.encode(frame.image(rgb).to(device)[None])
    logits = [student.decode(levels, prompt)[0] for prompt in each]
    return torch.stack([frame.restore(low, height, width).cpu() > 0 for low in logits])


def overlay(rgb: NDArray[np.uint8], masks: Tensor, prompts: list[Prompt]) -> Image.Image:
    """Return the image with masks in blue and prompts in yellow, points beside it in orange."""
    picture = torch.from_numpy(rgb).permute(2, 0, 1)
    picture = draw_segmentation_masks(picture, masks.any(dim=0), alpha=0.5, colors=BLUE)
    numbers = torch.tensor([prompt.numbers for prompt in prompts])
    thick = max(1, max(rgb.shape) // 300)
    if numbers.shape[1] == len(BOX):
        picture = draw_bounding_boxes(picture, numbers, colors=YELLOW, width=thick)
    else:
        for label, color in ((1, YELLOW), (0, ORANGE)):
            points = numbers[None, numbers[:, 2] == label, :2]
            picture = draw_keypoints(picture, points, colors=color, radius=2 * thick)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
