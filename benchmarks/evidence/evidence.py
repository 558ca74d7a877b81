"""The comparison of `protocol.md`: does the loss help, what in it, and what else does?

`python benchmarks/evidence/evidence.py primary --data data --teacher teacher/teacher.safetensors
--output runs/evidence` runs what is missing of a part, and goes on after a kill. `rates` comes
first, as the others take their learning rates from it. `--data` holds the folder `general`, and a
folder for each domain; any folders of that layout will do. `report.py` makes tables and figures of
the table `runs.csv`.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import candidates
from grid import (
    Evaluation,
    Grid,
    Run,
    add_running,
    digest_of_file,
    digest_of_tables,
    number_in,
    shown,
    tables_of,
)
from parts.data.reading import read_mask
from parts.data.tables import Row, Splits
from parts.errors import InputError, plain_errors
from parts.files import appearing
from parts.options import DISTILLERS, SPLITS, WITH_LAYERS, place

SOURCE = "general"
IMAGES, BATCH, STEPS, VALIDATIONS = 24, 4, candidates.STEPS, 5
RATES = ("2e-4", "6e-4", "2e-3")
RATE_SEED, RATE_DOMAINS = 100, ("rice_leaf_disease", "roads_epfl")
PRIMARY_SEEDS, SECOND_SEEDS, THIRD_SEEDS = range(20), range(3), range(5)
FRESH_SEEDS, FRESH_DOMAINS = range(200, 210), ("roads_epfl", "cracks_cfd")
SECOND_DOMAINS = ("rice_leaf_disease", "busi", "nuclei_dsb2018")
WEIGHTS, WEIGHTS_DOMAIN = ("0.1", "0.5", "1", "2"), "rice_leaf_disease"
SHARES = ("0.5", "0.75")
KEPT = 121  # pictures of the source
INFORMING = 0.5  # a box that covers less of its image than this says where the object is
PLAIN, INFOSAM = "plain", "infosam"
WEIGHTED = "infosam, weights "  # what the names of arms with other weights start with
TABLE = "runs.csv"
PARTS = ("rates", "primary", "second", "third", "weights", "candidates", "fresh")


class Arm(NamedTuple):
    """What is compared: options of the fine-tuning program.

    Attributes:
        name: What the tables call it.
        options: Those of the program that are not the same in all arms.
        rate_of: The arm that has its learning rate.
        rate_factor: What that is multiplied by.
        batch: Images of a step.
        steps: The least number of steps.
        through: A program that adds distillers to the fine-tuning program.
    """

    name: str
    options: tuple[str, ...]
    rate_of: str = PLAIN
    rate_factor: float = 1.0
    batch: int = BATCH
    steps: int = STEPS
    through: tuple[str, ...] = ()


CANDIDATES_OF = (candidates.__file__,)
RANDOM_TEACHER = ("--teacher", "small", "--teacher-checkpoint", "RANDOM")
WITHOUT = ("--distiller", "none")
PRIMARY = (Arm(PLAIN, WITHOUT), Arm(INFOSAM, (), INFOSAM))
SECOND = (
    Arm("infosam without L_r", ("--compression-weight", "0"), INFOSAM),
    Arm("infosam without L_d", ("--distillation-weight", "0"), INFOSAM),
    Arm("infosam, normalised residual", ("--relation", "attention-1-normalized"), INFOSAM),
    Arm("infosam, dot product", ("--relation", "dot-product"), INFOSAM),
    Arm("infosam, alpha 1.01", ("--alpha", "1.01"), INFOSAM),
    Arm("infosam, alpha 3", ("--alpha", "3"), INFOSAM),
    Arm("plain, batch 16", WITHOUT, batch=16),
    Arm("infosam, batch 16", (), INFOSAM, batch=16),
    Arm("plain, adapter", (*WITHOUT, "--method", "adapter")),
    Arm("infosam, adapter", ("--method", "adapter"), INFOSAM),
    *(Arm(name, ("--distiller", name)) for name in DISTILLERS if name not in (INFOSAM, "none")),
    Arm("L2-SP", (*WITHOUT, "--start-weight", "0.1")),
    Arm("half the learning rate", WITHOUT, rate_factor=0.5),
    Arm("infosam, random teacher", RANDOM_TEACHER, INFOSAM),
    Arm("infosam, shuffled teacher", ("--shuffled-teacher",), INFOSAM),
)
BY_ONE = {"batch": 1, "steps": STEPS * BATCH}
TRIED = (
    *(Arm(name, ("--distiller", name), through=CANDIDATES_OF) for name in candidates.CANDIDATES),
    Arm("plain, batch 1", WITHOUT, **BY_ONE),
    *(
        Arm(f"{name}, batch 1", ("--distiller", name), through=CANDIDATES_OF, **BY_ONE)
        for name in ("anchor", "memory-32", "memory-64")
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of a part, or say what that would be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=place, required=True, help="the folders of all data sets")
    parser.add_argument("--teacher", type=place, required=True, help="what pretrain.py has written")
    parser.add_argument("--output", type=place, required=True, help="the folder of all runs")
    parser.add_argument("--best", nargs=2, help="the two arms for the parts third and fresh")
    add_running(parser)
    options = parser.parse_args(argv)
    if (options.part in ("third", "fresh")) != (options.best is not None):
        parser.error("--best is for the parts third and fresh, and they need it")
    with plain_errors():
        grid = Grid(options.output, options.threads, discard=True)
        study = Study(options.data, options.teacher, options.output)
        runs = [*planned(options, study, grid)]
        if options.show is not None:
            named = [run for run in runs if run.name == options.show]
            if not named:
                names = ", ".join(run.name for run in runs[:3])
                raise InputError(f"--show must name a run such as {names}, got {options.show}")
            study.write()  # what the commands read
            print("\n".join(map(shown, grid.commands(named[0]))))
            return
        made_of = study.made_of()
        grid.check(made_of)
        print(grid.plan(runs, options.jobs, options.seconds_per_step))
        if options.dry_run:
            print("\n".join(run.name for run in grid.missing(runs)))
        else:
            study.write()
            grid.run_missing(runs, options.jobs, made_of)


def planned(options: argparse.Namespace, study: Study, grid: Grid) -> Iterator[Run]:
    """Yield all runs of a part.

    Raises:
        InputError: If learning rates were not chosen yet, or if an arm is unknown.
    """
    if options.part == "rates":
        for arm in PRIMARY:
            for rate in RATES:
                for domain in study.among(RATE_DOMAINS):
                    yield study.run(arm, domain, RATE_SEED, float(rate), IMAGES)
        return
    rates = chosen_rates(list(grid.rows().values()), study.among(RATE_DOMAINS))
    every = [*asked(options, study)]
    for seed in sorted({seed for *_, seeds, _ in every for seed in seeds}):  # pairs side by side
        for arm, domains, seeds, images in every:
            rate = rates[arm.rate_of] * arm.rate_factor
            for domain in domains if seed in seeds else ():
                yield study.run(arm, domain, seed, rate, images)


def asked(
    options: argparse.Namespace, study: Study
) -> Iterator[tuple[Arm, list[str], range, int | None]]:
    """Yield each arm of a part with its domains, its seeds and the number of training images."""
    if options.part == "primary":
        for arm in PRIMARY:
            yield arm, study.domains, PRIMARY_SEEDS, IMAGES
    elif options.part == "second":
        for arm in SECOND:
            yield arm, study.among(SECOND_DOMAINS), SECOND_SEEDS, IMAGES
    elif options.part == "weights":
        for first in WEIGHTS:
            for second in WEIGHTS:
                weights = ("--compression-weight", first, "--distillation-weight", second)
                arm = Arm(f"{WEIGHTED}{first} and {second}", weights, INFOSAM)
                yield arm, study.among((WEIGHTS_DOMAIN,)), SECOND_SEEDS, IMAGES
    elif options.part == "candidates":
        for arm in TRIED:
            yield arm, study.among(SECOND_DOMAINS), SECOND_SEEDS, IMAGES
    elif options.part == "third":
        for arm in (*PRIMARY, *best(options.best, SECOND)):
            yield arm, study.domains, THIRD_SEEDS, None
    else:
        for arm in (PRIMARY[0], *best(options.best, TRIED)):
            yield arm, study.among(FRESH_DOMAINS), FRESH_SEEDS, IMAGES


def best(names: Sequence[str], arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms that are named.

    Raises:
        InputError: If they are not two of these.
    """
    every = {arm.name: arm for arm in arms}
    if len({*names} & {*every}) < 2:
        found = " and ".join(names)
        raise InputError(f"--best must name two of {', '.join(every)}, got {found}")
    return [every[name] for name in names]


def chosen_rates(rows: list[dict[str, str]], domains: Sequence[str]) -> dict[str, float]:
    """Return the learning rate of each primary arm that is best in validation.

    Raises:
        InputError: If a run is missing.
    """
    found = {
        (row["arm"], float(row["rate"]), row["domain"]): number_in(row, "validation_iou", TABLE)
        for row in rows
        if row.get("seed") == str(RATE_SEED)
    }
    chosen = {}
    for arm in PRIMARY:
        scores = {}
        for rate in map(float, RATES):
            keys = [(arm.name, rate, domain) for domain in domains]
            if not found.keys() >= {*keys}:
                raise InputError("run the part rates to its end first; it chooses learning rates")
            scores[rate] = mean(found[key] for key in keys)
        chosen[arm.name] = max(scores, key=scores.__getitem__)
    return chosen


class Study:
    """The data sets, and the runs on parts of them.

    Args:
        data: The folders of the source and of the domains.
        teacher: Weights of the pre-trained model.
        output: Where the tables of subsets are written.

    Attributes:
        domains: The names of the domains.
    """

    def __init__(self, data: Path, teacher: Path, output: Path) -> None:
        self.data, self.teacher, self.output = data, teacher, output
        self.domains = domains_of(data)
        self.prompts: dict[str, tuple[str, ...]] = {}
        self.tables: dict[Path, Splits] = {}
        self.random_teacher = output / "random_teacher.safetensors"
        self.reads_random_teacher = False

    def among(self, names: Sequence[str]) -> list[str]:
        """Return those of the named domains that are there, or all domains if none of them is."""
        return [name for name in names if name in self.domains] or self.domains

    def run(self, arm: Arm, domain: str, seed: int, rate: float, images: int | None) -> Run:
        """Return the run of an arm."""
        folder, count = self.subset(domain, seed, images)
        per_epoch = count // arm.batch
        epochs = max(math.ceil(arm.steps / per_epoch), 1 if images else 10)
        random = str(self.random_teacher)
        arguments = [random if value == "RANDOM" else value for value in arm.options]
        self.reads_random_teacher |= random in arguments
        arguments += ["--model", "small", "--checkpoint", str(self.teacher)]
        arguments += ["--data", str(folder), "--seed", str(seed), "--lr", f"{rate:g}"]
        arguments += ["--epochs", str(epochs), "--batch-size", str(arm.batch)]
        arguments += ["--validate-every", str(max(1, epochs // VALIDATIONS))]
        arguments += ["--precision", "bf16"]
        arguments += ["--workers", "0", *self.prompts_of(domain)]
        if not {"none", *WITH_LAYERS} & {*arguments}:
            arguments += ["--teacher-cache", str(self.output / "cache")]
        labels = {"arm": arm.name, "domain": domain, "seed": str(seed)}
        labels |= {"images": str(images or "all"), "rate": f"{rate:g}"}
        name = "-".join(labels.values()).replace(", ", ",").replace(" ", "_")
        return Run(
            name,
            labels,
            "finetune_sam.py",
            tuple(arguments),
            self.evaluations(arm, seed),
            epochs * per_epoch,
            through=arm.through,
        )

    def evaluations(self, arm: Arm, seed: int) -> tuple[Evaluation, ...]:
        """Return what is asked of a run: the target, and what is kept of the source."""
        averaged: tuple[str, ...] = ()
        averages = arm.name in (PLAIN, INFOSAM) or arm.through
        if averages and (seed in SECOND_SEEDS or seed in FRESH_SEEDS):
            averaged = ("--average", *SHARES)
        kept = ("--on", str(self.kept()), *averaged)
        return (
            Evaluation("target", averaged),
            Evaluation("source_box", (*kept, "--prompts", "boxes")),
            Evaluation("source_point", (*kept, "--prompts", "points", "--points", "1")),
        )

    def prompts_of(self, domain: str) -> tuple[str, ...]:
        """Return how a domain is evaluated: by boxes if they inform, else by five points."""
        if domain not in self.prompts:
            rows = tables_of(self.data / domain)["train"]
            covered = mean(share_of_box(row.label) for row in rows)
            points = ("--eval-prompts", "points", "--eval-points", "5")
            self.prompts[domain] = () if covered < INFORMING else points
        return self.prompts[domain]

    def subset(self, domain: str, seed: int, images: int | None) -> tuple[Path, int]:
        """Return a folder with the tables of a seed's training images, and how many there are."""
        splits = tables_of(self.data / domain).copy()
        if images is not None:
            if len(splits["train"]) < images:
                count = len(splits["train"])
                raise InputError(f"{images} training images are needed, {domain} has {count}")
            splits["train"] = drawn(splits["train"], seed, images)
        folder = self.output / "data" / f"{domain}-{images or 'all'}-{seed if images else 0}"
        self.tables[folder] = splits
        return folder, len(splits["train"])

    def kept(self) -> Path:
        """Return a folder with the tables of what students are asked to keep of the source."""
        splits = tables_of(self.data / SOURCE)
        pictures = {row.image: row for row in reversed(splits["test"])}
        first = [pictures[image] for image in dict.fromkeys(row.image for row in splits["test"])]
        few = {split: rows[:1] for split, rows in splits.items()}  # they are not used
        folder = self.output / "data" / SOURCE
        self.tables[folder] = few | {"test": first[::2][:KEPT]}
        return folder

    def made_of(self) -> dict[str, str]:
        """Return digests of all that the runs read."""
        found = {f"tables of {name}": digest_of_tables(self.data / name) for name in self.domains}
        found[f"tables of {SOURCE}"] = digest_of_tables(self.data / SOURCE)
        return found | {"teacher": digest_of_file(self.teacher, "--teacher")}

    def write(self) -> None:
        """Write what the planned runs read, unless it is there."""
        for folder, splits in self.tables.items():
            if not folder.exists():
                write_tables(folder, splits)
        if self.reads_random_teacher and not self.random_teacher.exists():
            write_random_teacher(self.random_teacher)


def domains_of(data: Path) -> list[str]:
    """Return the names of all data sets but the source.

    Raises:
        InputError: If there is none, or no source.
    """
    folders = sorted(path.parent.name for path in data.glob("*/train.csv"))
    domains = [name for name in folders if name != SOURCE]
    if SOURCE not in folders or not domains:
        raise InputError(f"--data must have {SOURCE} and other folders with tables, got {data}")
    return domains


def drawn(rows: list[Row], seed: int, count: int) -> list[Row]:
    """Return the rows of a seed: subsets are disjoint until the rows are used up."""
    per_round = len(rows) // count
    order = np.random.default_rng(seed // per_round).permutation(len(rows))
    start = seed % per_round * count
    return [rows[i] for i in order[start : start + count]]


def share_of_box(mask: Path) -> float:
    """Return how much of its image the box around a mask covers."""
    inside = read_mask(mask).object
    if not inside.any():
        raise InputError(f"{mask} must have an object, it is empty")
    height, width = (np.ptp(np.flatnonzero(inside.any(axis))) + 1 for axis in (1, 0))
    return float(height * width / inside.size)


def write_tables(folder: Path, splits: Splits) -> None:
    """Write three tables of rows that lie elsewhere."""
    with appearing(folder) as place:
        place.mkdir()
        for split in SPLITS:
            with (place / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(["image", "label"])
                table.writerows(row[:2] for row in splits[split])


def write_random_teacher(path: Path) -> None:
    """Write a model that was not pre-trained but for its backbone."""
    from pretrain import save, untrained

    torch.manual_seed(0)
    with appearing(path) as place:
        save(untrained(decoder=False), place)


if __name__ == "__main__":
    main()
