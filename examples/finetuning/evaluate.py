"""Compare fine-tuned models.

`python examples/finetuning/evaluate.py runs/leaf-0 runs/leaf-1 --pretrained` prints a table with a
row for each run, and below it the mean and the standard deviation over runs that differ in nothing
but their seed. It writes the same to `scores.json`, and a row for each run and image to
`images.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from parts import checkpoint
from parts.data import SPLITS, MaskedImages, collate
from parts.evaluation import predictions
from parts.metrics import image_scores
from parts.options import plain_errors, read_splits
from parts.trained import load_run

Scores = dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate every run on its own data and with its own kind of prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="--output of a fine-tuning script")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--test-table", help="another table than that of the run")
    parser.add_argument("--pretrained", action="store_true", help="also the models before training")
    parser.add_argument("--paper", action="store_true", help="the metrics of the released program")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder to write")
    arguments = parser.parse_args(argv)

    asked = [(str(run), run, None) for run in arguments.runs]
    if arguments.pretrained:
        asked += [(f"{run} before", run, 0) for run in arguments.runs]
    by_image: dict[str, dict[str, Scores]] = {}
    groups: dict[str, list[str]] = defaultdict(list)
    with plain_errors():
        for name, run, epoch in asked:
            by_image[name], group = evaluate_run(run, epoch, arguments)
            groups[group].append(name)

    scores = {name: average([*images.values()]) for name, images in by_image.items()}
    seeds = {" ".join(names): names for names in groups.values() if len(names) > 1}
    print_table(scores, seeds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"split": arguments.split, "paper": arguments.paper, "runs": scores}
    result["seeds"] = {name: spread([scores[n] for n in names]) for name, names in seeds.items()}
    checkpoint.write_json(arguments.output / "scores.json", result)
    with (arguments.output / "images.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "image", *next(iter(scores.values()))])
        for name, images in by_image.items():
            table.writerows([name, image, *values.values()] for image, values in images.items())


def evaluate_run(
    run: Path, epoch: int | None, arguments: argparse.Namespace
) -> tuple[dict[str, Scores], str]:
    """Return the scores of each image, and a key that runs share if only their seeds differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, options = load_run(run, epoch)
    options.test_table = arguments.test_table or options.test_table
    rows = read_splits(options)[arguments.split]
    loader = DataLoader(MaskedImages(rows, model.frame), options.batch_size, collate_fn=collate)
    batches = (batch.to(device) for batch in loader)
    found = predictions(model.to(device), batches, options.eval_prompts, options.eval_points)
    images = {
        str(rows[index].image): image_scores(logits, truth, paper=arguments.paper)
        for index, logits, truth in tqdm(found, str(run), len(rows))
    }
    common = vars(options) | {"seed": None, "output": None, "epoch": epoch}
    return images, json.dumps(common, default=str, sort_keys=True)


def average(scores: list[Scores]) -> Scores:
    """Return the mean of each score."""
    return {name: mean(score[name] for score in scores) for name in scores[0]}


def spread(scores: list[Scores]) -> dict[str, Scores]:
    """Return mean and standard deviation of each score over runs of several seeds."""
    deviations = {name: stdev(score[name] for score in scores) for name in scores[0]}
    return {"mean": average(scores), "standard deviation": deviations}


def print_table(scores: dict[str, Scores], seeds: dict[str, list[str]]) -> None:
    """Print all scores in percent, and below them their mean and standard deviation over seeds."""
    width = max(map(len, scores))
    names = [*next(iter(scores.values()))]
    print(" " * width, *(f"{name.replace('boundary_f1_', 'BF1 '):>12}" for name in names))
    for run, values in scores.items():
        print(f"{run:{width}}", *(f"{100 * value:12.2f}" for value in values.values()))
    for runs in seeds.values():
        both = spread([scores[run] for run in runs])
        figures = zip(*(part.values() for part in both.values()), strict=True)
        print(f"the {len(runs)} seeds of {runs[0]}, mean ± standard deviation:")
        print(" " * width, end=" ")
        print(*(f"{f'{100 * m:.2f} ± {100 * s:.2f}':>12}" for m, s in figures))


if __name__ == "__main__":
    main()
