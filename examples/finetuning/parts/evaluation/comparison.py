"""Scores of several runs side by side, and their spread over seeds."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from parts.data.batches import MaskedImages, collate
from parts.data.check import Report, read_data
from parts.data.reading import reading_of
from parts.data.tables import Row, Splits
from parts.evaluation.metrics import image_scores
from parts.evaluation.scores import predictions
from parts.files import appearing, refuse_existing
from parts.options import TEST_TABLE, next_command
from parts.runs.folder import check_digests, digest_of_data, places, read_options
from parts.runs.trained import average, check_merged, load_run

Scores = dict[str, float]


class Asked(NamedTuple):
    """A model to evaluate."""

    name: str
    run: Path
    epoch: int | None  # None for the best, 0 for the model before training
    share: float  # of its own weights; the rest is from before training
    options: argparse.Namespace
    splits: Splits


class Found(NamedTuple):
    """The scores of a model: those of each row, and their means."""

    rows: list[tuple[Row, Scores]]
    means: Scores


def compare(arguments: argparse.Namespace) -> None:
    """Evaluate every run on its own data and with its own kind of prompts, print and write it.

    Raises:
        InputError: If something is where the results would be, or if a run cannot be used.
    """
    if arguments.output is not None:
        refuse_existing([arguments.output])
    asked = models(arguments)
    with ExitStack() as stack:
        # That there can be a folder is to be known before everything is evaluated.
        place = None
        if arguments.output is not None:
            place = stack.enter_context(appearing(arguments.output))
        found = {model.name: evaluate(model, arguments) for model in asked}
        seeds = {shlex.join(names): names for names in groups_of_seeds(asked)}
        print_table({name: model.means for name, model in found.items()}, seeds)
        if place is not None:
            place.mkdir()
            write(found, seeds, place, arguments)
    if arguments.output is not None:
        print(f"scores.json and images.csv: {arguments.output}")
    runs = dict.fromkeys(model.run for model in asked)
    print(next_command("pictures.py", *runs, "--output", "pictures"))


def models(arguments: argparse.Namespace) -> list[Asked]:
    """Return what there is to evaluate: each run once, and each model before training once.

    No two have the same name.

    Raises:
        InputError: If a run cannot be used, or if its data are others by now.
    """
    runs: dict[Path, Asked] = {}
    read: dict[str, tuple[Splits, Report]] = {}
    for run in arguments.runs:
        options = read_options(run, arguments)
        replace_options(options, arguments)
        if run.resolve() in runs:
            print(f"{run} is the run {runs[run.resolve()].run}, and is evaluated once.")
            continue
        names = ("data", "test_table", "images", "masks", "coco")
        key = str([getattr(options, name) for name in names] + [reading_of(options)])
        if key not in read:
            read[key] = read_data(options)
        splits, report = read[key]
        found = digest_of_data(report)
        others = found if arguments.on is not None else {}
        if arguments.test_table is not None:
            others = others | {"test": found["test"]}
        options.digests = options.digests and options.digests | others
        check_digests(run, options.digests, found)
        runs[run.resolve()] = Asked(str(run), run, None, 1.0, options, splits)
    before: dict[str, Asked] = {}
    averaged = [
        model._replace(name=f"{model.name} {share:g} averaged", share=share)
        for model in runs.values()
        for share in dict.fromkeys(arguments.average)
    ]
    for model in averaged:
        check_merged(model.run, model.options)
    names = {model.name for model in runs.values()}
    for model in runs.values() if arguments.pretrained else ():
        name = f"{model.name} before"
        while name in names:  # a run of this name
            name += " training"
        before.setdefault(pretrained(model.options), model._replace(name=name, epoch=0))
    return [*runs.values(), *averaged, *before.values()]


def replace_options(options: argparse.Namespace, arguments: argparse.Namespace) -> None:
    """Put what the command line says of data and prompts in place of what a run says."""
    if arguments.on is not None:
        options.data, options.images, options.masks = arguments.on, None, None
        options.coco = None
        options.foreground, options.ignore, options.image_range = [], [], None
        options.test_table = TEST_TABLE
    options.test_table = arguments.test_table or options.test_table
    options.eval_prompts = arguments.prompts or options.eval_prompts
    options.eval_points = arguments.points or options.eval_points


def what_counts(options: argparse.Namespace) -> dict[str, object]:
    """Return the options of a run, with the contents of data and weights in place of paths."""
    content = vars(options).copy()
    if options.digests:
        for name in places(options):
            content.pop(name)
    return content | options.digests


def pretrained(options: argparse.Namespace) -> str:
    """Return what is the same for runs whose models before training have the same scores."""
    names = {"package", "model", "checkpoint", "data", "test", "test_table", "foreground", "ignore"}
    names |= {"image_range", "eval_prompts", "eval_points", "batch_size"}
    if options.checkpoint is None and "model" not in options.digests:
        names.add("seed")  # which drew the weights
    content = what_counts(options)
    return json.dumps({name: content.get(name) for name in sorted(names)}, default=str)


def groups_of_seeds(asked: list[Asked]) -> list[list[str]]:
    """Return the names of runs that differ in nothing but their seeds, and in these."""
    groups: dict[str, list[Asked]] = defaultdict(list)
    for model in asked:
        common = what_counts(model.options)
        common |= {"seed": None, "epoch": model.epoch, "share": model.share}
        groups[json.dumps(common, default=str, sort_keys=True)].append(model)
    found = []
    for group in groups.values():
        firsts: dict[int, str] = {}
        for model in group:
            first = firsts.setdefault(model.options.seed, model.name)
            if first != model.name:
                print(
                    f"{model.name} has the seed of {first}, and is left out of the mean of seeds."
                )
        if len(firsts) > 1:
            found.append([*firsts.values()])
    return found


def evaluate(asked: Asked, arguments: argparse.Namespace) -> Found:
    """Return the scores of a model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = asked.options
    model, _ = load_run(asked.run, asked.epoch, arguments)
    if asked.share != 1:
        average(model, load_run(asked.run, 0, arguments)[0], asked.share)
    rows = asked.splits[arguments.split]
    images = MaskedImages(rows, model.frame, reading_of(options))
    loader = DataLoader(images, options.batch_size, collate_fn=collate)
    batches = (batch.to(device) for batch in loader)
    found = predictions(model.to(device), batches, options.eval_prompts, options.eval_points)
    scored = [
        (rows[index], image_scores(logits, truth, paper=arguments.paper))
        for index, logits, truth in tqdm(found, asked.name[-30:], len(rows), ncols=80)
    ]
    return Found(scored, mean_scores([scores for _, scores in scored]))


def mean_scores(scores: list[Scores]) -> Scores:
    """Return the mean of each score."""
    return {name: mean(score[name] for score in scores) for name in scores[0]}


def spread(scores: list[Scores]) -> dict[str, Scores]:
    """Return mean and standard deviation of each score over runs of several seeds."""
    deviations = {name: stdev(score[name] for score in scores) for name in scores[0]}
    return {"mean": mean_scores(scores), "standard deviation": deviations}


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


def write(
    found: dict[str, Found],
    seeds: dict[str, list[str]],
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    """Write all means and spreads to scores.json, and a line for each model and row to a table."""
    scores = {name: model.means for name, model in found.items()}
    spreads = {name: spread([scores[run] for run in runs]) for name, runs in seeds.items()}
    asked = {name: getattr(arguments, name) for name in ("split", "paper", "prompts", "points")}
    asked["on"] = None if arguments.on is None else str(arguments.on)
    result = asked | {"runs": scores, "seeds": spreads}
    (folder / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    # Of a name that is no UTF-8, what cannot be written is written with escapes.
    unicode = {"encoding": "utf-8", "errors": "backslashreplace"}
    with (folder / "images.csv").open("w", newline="", **unicode) as file:
        table = csv.writer(file)
        table.writerow(["run", "row", "image", "mask", *next(iter(scores.values()))])
        for name, model in found.items():
            for number, (row, values) in enumerate(model.rows):
                table.writerow([name, number, row.image, row.label, *values.values()])
