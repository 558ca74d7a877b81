"""Segment images with a fine-tuned model.

`python examples/finetuning/predict.py runs/leaf prompts.csv --output masks` reads prompts from a
table. Its columns are `image` and either `x0,y0,x1,y1`, which is a box, or `x,y,label`, which is a
point on the object (label 1) or beside it (label 0). All numbers are pixels of the image. Each box
gives a mask of its own, and all points of an image give one mask together. Masks are PNG files of 0
and 255, in the size of the image.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from parts.data import UNREADABLE, read_image
from parts.frame import Frame
from parts.options import plain_errors
from parts.prompts import Prompts
from parts.trained import load_run

BOX, POINT = ("x0", "y0", "x1", "y1"), ("x", "y", "label")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the table, segment, write the masks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the --output of a fine-tuning script")
    parser.add_argument("table", type=Path, help="the prompts")
    parser.add_argument("--images", type=Path, help="folder of the images, by default the table's")
    parser.add_argument("--output", type=Path, required=True, help="folder of the masks")
    parser.add_argument("--epoch", type=int, help="another epoch than the best")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with plain_errors():
        asked = read_prompts(arguments.table)
        student, _ = load_run(arguments.run, arguments.epoch)
        student.to(device)
        folder = arguments.images or arguments.table.parent
        targets = mask_paths(asked, folder, arguments.output)
        for name, prompts in tqdm(asked.items(), "segmenting"):
            targets[name][0].parent.mkdir(parents=True, exist_ok=True)
            try:
                image = read_image(folder / name)
            except UNREADABLE as error:
                raise ValueError(f"{folder / name} cannot be read: {error}") from error
            height, width = image.shape[:2]
            pixels = student.frame.image(image).to(device)[None]
            with torch.no_grad():
                levels = student.encode(pixels)
                each = scaled(prompts, student.frame, height, width)
                for prompt, path in zip(each, targets[name], strict=True):
                    prompt = Prompts(*(x if x is None else x.to(device) for x in prompt))
                    logits = student.decode(levels, prompt)[0]
                    mask = student.frame.restore(logits, height, width) > 0
                    Image.fromarray(mask.cpu().numpy()).convert("L").save(path)


def read_prompts(path: Path) -> dict[str, list[list[float]]]:
    """Return the prompts of each image, four numbers for a box and three for a point."""
    asked = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = BOX if {"image", *BOX} <= {*(table.fieldnames or ())} else POINT
            if not {"image", *columns} <= {*(table.fieldnames or ())}:
                raise ValueError(
                    f"{path} must have columns image and {','.join(BOX)} or {','.join(POINT)}, "
                    f"got {','.join(table.fieldnames or ())}"
                )
            for row in table:
                asked[row["image"]].append([float(row[column]) for column in columns])
    except (OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return dict(asked)


def mask_paths(
    asked: dict[str, list[list[float]]], folder: Path, output: Path
) -> dict[str, list[Path]]:
    """Return the paths of the masks of each image.

    The first mask of `folder/a/b.jpg` goes to `output/a/b.png`, the second to `output/a/b-2.png`.

    Raises:
        ValueError: If an image or another mask would be overwritten.
    """
    images = {(folder / name).resolve() for name in asked}
    taken = dict[Path, str]()
    paths = {}
    for name, prompts in asked.items():
        place = (folder / name).resolve()
        inside = place.is_relative_to(folder.resolve())
        stem = output / (place.relative_to(folder.resolve()) if inside else place.name)
        masks = len(prompts) if len(prompts[0]) == len(BOX) else 1
        paths[name] = [
            stem.with_name(f"{stem.stem}-{i + 1}.png" if i else f"{stem.stem}.png")
            for i in range(masks)
        ]
        for path in paths[name]:
            if path.resolve() in images:
                raise ValueError(f"--output must not hold the images, a mask would replace {path}")
            if path in taken:
                raise ValueError(f"{name} and {taken[path]} would both have the mask {path}")
            taken[path] = name
    return paths


def scaled(prompts: list[list[float]], frame: Frame, height: int, width: int) -> Iterator[Prompts]:
    """Yield each box, or all points together, in pixels of the model's input."""
    numbers = torch.tensor(prompts)
    if numbers.shape[1] == len(BOX):
        for box in frame.boxes(numbers, height, width):
            yield Prompts(box[None])
    else:
        points = frame.boxes(numbers[:, [0, 1, 0, 1]], height, width)[:, :2]
        yield Prompts(points=points[None], labels=numbers[None, :, 2].int())


if __name__ == "__main__":
    main()
