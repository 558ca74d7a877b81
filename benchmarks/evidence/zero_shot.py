"""How good the teacher of the evidence is: on its source by size of mask, and on each domain.

`python benchmarks/evidence/zero_shot.py --data data --teacher teacher/teacher.safetensors` prints
both tables, of the test splits and before any fine-tuning. The size of a mask is the shorter side
of the box around it, in pixels of the picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes

from evidence import SOURCE, domains_of
from parts.data.batches import MaskedImages, collate
from parts.data.tables import read_tables
from parts.errors import InputError, plain_errors
from parts.evaluation.metrics import dice_and_iou
from parts.evaluation.scores import predictions
from parts.models.sam import build
from parts.models.segmenter import Segmenter
from parts.options import place

EDGES = (0, 16, 32, 64, 257)
LEAST_SIDE, ABOVE_THE_BOX, LEAST_BY_POINT = 32, 0.10, 0.45
BATCH = 16


class Score(NamedTuple):
    """What was found of a mask: its size, and the IoU of the filled box and of the model."""

    side: int
    filled: float
    found: dict[str, float]  # by the kind of prompt


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables, and whether the teacher is good enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=place, required=True, help="the folders of all data sets")
    parser.add_argument("--teacher", type=place, required=True, help="what pretrain.py has written")
    options = parser.parse_args(argv)
    with plain_errors():
        domains = domains_of(options.data)
        model = build("small", options.teacher).eval()
        print_source(scores(model, options.data / SOURCE, {"box": 0, "point": 1}))
        print("\n| domain | masks | filled box | box | one point | five points |")
        print("|---|---|---|---|---|---|")
        for domain in domains:
            prompts = {"box": 0, "point": 1, "points": 5}
            found = scores(model, options.data / domain, prompts)
            print(row(domain, found, prompts))


def print_source(found: list[Score]) -> None:
    """Print the source by the size of its masks, and say whether that is enough."""
    prompts = ("box", "point")
    print("| masks of the source with a shorter side of | masks | filled box | box | one point |")
    print("|---|---|---|---|---|")
    for low, high in pairwise(EDGES):
        inside = [score for score in found if low <= score.side < high]
        name = f"{low} to {high - 1} pixels" if high < EDGES[-1] else f"{low} pixels or more"
        if inside:
            print(row(name, inside, prompts))
    large = [score for score in found if score.side >= LEAST_SIDE]
    if not large:
        raise InputError(f"the source must have masks of {LEAST_SIDE} pixels, none is as large")
    print(row(f"{LEAST_SIDE} pixels or more", large, prompts))
    print(row("any size", found, prompts))
    above = mean(score.found["box"] - score.filled for score in large)
    by_point = mean(score.found["point"] for score in large)
    enough = above >= ABOVE_THE_BOX and by_point >= LEAST_BY_POINT
    print(
        f"\nFrom {LEAST_SIDE} pixels on, a box gives {100 * above:+.1f} points over the filled "
        f"box, and a point {by_point:.3f}. It should be at least {100 * ABOVE_THE_BOX:+.1f} and "
        f"{LEAST_BY_POINT}: the teacher is {'' if enough else 'not '}good enough."
    )


def scores(model: Segmenter, folder: Path, prompts: dict[str, int]) -> list[Score]:
    """Return the scores of a test split, for each kind of prompt with its number of points."""
    rows = read_tables(folder)["test"]
    loader = DataLoader(MaskedImages(rows, model.frame), BATCH, collate_fn=collate)
    found: list[dict[str, float]] = [{} for _ in rows]
    shapes: dict[int, tuple[int, float]] = {}
    for kind, points in prompts.items():
        how = ("points", points) if points else ("boxes", 1)
        for index, logits, truth in predictions(model, loader, *how):
            found[index][kind] = dice_and_iou(logits > 0, truth)[1]
            left, top, right, bottom = masks_to_boxes(truth[None])[0].int().tolist()
            height, width = bottom - top + 1, right - left + 1
            shapes[index] = min(height, width), truth.sum().item() / (height * width)
    return [Score(*shapes[i], values) for i, values in enumerate(found)]


def row(name: str, found: Sequence[Score], prompts: Sequence[str]) -> str:
    """Return a row of a table with mean IoUs."""
    values = [mean(score.filled for score in found)]
    values += [mean(score.found[kind] for score in found) for kind in prompts]
    return f"| {name} | {len(found)} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


if __name__ == "__main__":
    main()
