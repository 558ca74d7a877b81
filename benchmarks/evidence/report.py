"""Tables and figures of the evidence, from its table of runs alone.

`python benchmarks/evidence/report.py runs.csv --output report` makes a folder with `evidence.md`
and three figures, each as PNG, PDF and SVG: `forest` has the effect of every arm, `front` what is
gained on the target against what is kept of the source, and `weights` the scores over both weights
of the loss.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))

from evidence import (
    FRESH_SEEDS,
    INFOSAM,
    PLAIN,
    PRIMARY_SEEDS,
    RATE_SEED,
    SECOND_SEEDS,
    SHARES,
    TRIED,
    WEIGHTED,
)
from grid import Cells, number_in, read_table
from parts.errors import InputError, plain_errors
from parts.figures import BLUE, PAGE, VERMILION, figure_files, show_legend
from parts.files import appearing
from plots import draw

RESAMPLES = 10_000
LEAST_EFFECT = 0.3  # points of IoU
TARGET, BOX, POINT = "target/iou", "source_box/iou", "source_point/iou"
BOUNDARY = "target/boundary_f1_2"
OUTCOMES = {
    TARGET: "target IoU",
    BOUNDARY: "target boundary F1",
    BOX: "source IoU, box",
    POINT: "source IoU, point",
}
# What an arm is compared with: the same student and batch without a distiller.
BASELINES = {
    "infosam, batch 16": "plain, batch 16",
    "infosam, adapter": "plain, adapter",
    **{arm.name: "plain, batch 1" for arm in TRIED if arm.batch == 1},
}
FEW_SEEDS = (
    "So few seeds make the intervals too narrow: of simulated ones with three domains and three "
    "seeds, 85 % held the true mean, where 95 % should."
)

BAND = "#e6e6e6"
DOMAIN = {"color": VERMILION, "marker": ".", "linestyle": "none"}
TRAINED = {"color": BLUE, "marker": "o", "linestyle": "none"}
AVERAGED = {"color": VERMILION, "marker": "s", "linestyle": "none"}

# Scores in percent of an arm, by domain and seed.
Scores = dict[tuple[str, str], float]
Differences = dict[str, list[float]]  # of pairs of seeds, by domain


class Effect(NamedTuple):
    """A mean over domains of paired differences, in points."""

    mean: float
    low: float
    high: float
    between: float  # standard deviation between domains
    domains: dict[str, float]
    pairs: int


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and figures, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="runs.csv of evidence.py")
    parser.add_argument("--output", type=Path, required=True, help="the folder for what is written")
    options = parser.parse_args(argv)
    with plain_errors(), appearing(options.output) as folder:
        rows = read_runs(options.runs)
        folder.mkdir()
        few = few_images(rows)
        parts = (
            primary(of_seeds(few, PRIMARY_SEEDS)),
            arms(second_tier(rows)),
            fresh(of_seeds(few, FRESH_SEEDS)),
            everything(rows),
        )
        text = "\n\n".join(filter(None, parts))
        print(text)
        (folder / "evidence.md").write_text(f"{text}\n", encoding="utf-8")
        forest(second_tier(rows), folder / "forest")
        front(second_tier(rows), folder / "front")
        weights(few, folder / "weights")


def read_runs(path: Path) -> list[Cells]:
    """Return the rows of the table without those that chose learning rates.

    Raises:
        InputError: If there is no table of runs, or if it has a run twice.
    """
    rows = read_table(path)
    if not rows or not {"arm", "domain", "seed", "images"} <= rows[0].keys():
        raise InputError(f"{path} must be the runs.csv of evidence.py, with a run at least")
    rows = [row for row in rows if row["seed"] != str(RATE_SEED)]
    keys = [tuple(row[name] for name in ("arm", "domain", "seed", "images")) for row in rows]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise InputError(f"{path} has two rows of {', '.join(twice[0])}; remove one")
    return rows


def few_images(rows: Sequence[Cells]) -> list[Cells]:
    """Return the runs with few training images."""
    return [row for row in rows if row["images"] != "all"]


def of_seeds(rows: Sequence[Cells], seeds: range) -> list[Cells]:
    """Return the runs of some seeds."""
    return [row for row in rows if int(row["seed"]) in seeds]


def second_tier(rows: Sequence[Cells]) -> list[Cells]:
    """Return the runs of the seeds and domains on which all arms are compared."""
    few = few_images(rows)
    others = [row for row in few if row["arm"] not in (PLAIN, INFOSAM)]
    domains = {row["domain"] for row in others if WEIGHTED not in row["arm"]}
    return [row for row in of_seeds(few, SECOND_SEEDS) if row["domain"] in domains]


def scores_of(rows: Sequence[Cells], arm: str, outcome: str) -> Scores:
    """Return the scores of an arm; `plain at 0.5` is an arm whose weights were averaged."""
    name, _, share = arm.partition(" at ")
    test, metric = outcome.split("/")
    column = f"{test}/{share} averaged/{metric}" if share else outcome
    return {
        (row["domain"], row["seed"]): 100 * number_in(row, column, "the table")
        for row in rows
        if row["arm"] == name and row.get(column)
    }


def differences(rows: Sequence[Cells], arm: str, baseline: str, outcome: str) -> Differences:
    """Return the differences of two arms on the same seed, by domain."""
    one, other = (scores_of(rows, name, outcome) for name in (arm, baseline))
    found: Differences = defaultdict(list)
    for domain, seed in sorted(one.keys() & other.keys()):
        found[domain].append(one[domain, seed] - other[domain, seed])
    return dict(found)


def effect(found: Differences) -> Effect:
    """Return the mean over domains with its interval: seeds are drawn anew within each domain."""
    draw = np.random.default_rng(0)
    resampled = np.mean(
        [
            np.asarray(values)[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
            for values in found.values()
        ],
        axis=0,
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    domains = {domain: mean(values) for domain, values in found.items()}
    between = stdev(domains.values()) if len(domains) > 1 else 0.0
    pairs = sum(map(len, found.values()))
    return Effect(mean(domains.values()), float(low), float(high), between, domains, pairs)


def verdict(found: Effect) -> str:
    """Return the verdict of the protocol."""
    if found.mean >= LEAST_EFFECT and found.low > 0:
        return "helps"
    if found.mean <= -LEAST_EFFECT and found.high < 0:
        return "harms"
    if found.low >= -LEAST_EFFECT and found.high <= LEAST_EFFECT:
        return "no effect"
    return "undecided"


def primary(rows: Sequence[Cells]) -> str:
    """Return the primary comparison: each outcome by domain, and the verdict."""
    every = {name: differences(rows, INFOSAM, PLAIN, name) for name in OUTCOMES}
    target = every[TARGET]
    if not all(every.values()):
        return ""
    whole = effect(target)
    planned = len(PRIMARY_SEEDS) * len({row["domain"] for row in rows if row["arm"] == PLAIN})
    is_whole = whole.pairs == planned
    state = verdict(whole) if is_whole else f"incomplete, {whole.pairs} of {planned} pairs"
    lines = [f"## The primary comparison: {state}", ""]
    lines += ["| InfoSAM − plain, points | pairs | " + " | ".join(OUTCOMES.values()) + " |"]
    lines += ["|---" * (len(OUTCOMES) + 2) + "|"]
    for domain, values in target.items():
        alone = [effect({domain: found[domain]}) for found in every.values()]
        lines.append(f"| {domain} | {len(values)} | " + " | ".join(map(interval, alone)) + " |")
    means = [effect(found) for found in every.values()]
    lines.append(f"| mean of domains | {whole.pairs} | " + " | ".join(map(interval, means)) + " |")
    between = " | ".join(f"{found.between:.2f}" for found in means)
    lines.append(f"| standard deviation between domains | | {between} |")
    lines += ["", "| IoU of plain, % | " + " | ".join(OUTCOMES.values()) + " |"]
    lines += ["|---" * (len(OUTCOMES) + 1) + "|"]
    for domain in target:
        values = [by_domain(scores_of(rows, PLAIN, name))[domain] for name in OUTCOMES]
        lines.append(f"| {domain} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)


def by_domain(found: Scores) -> dict[str, float]:
    """Return the mean over the seeds of each domain."""
    values: dict[str, list[float]] = defaultdict(list)
    for (domain, _), score in found.items():
        values[domain].append(score)
    return {domain: mean(scores) for domain, scores in values.items()}


def interval(found: Effect) -> str:
    """Return an effect with its interval."""
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def arms_of(rows: Sequence[Cells]) -> list[str]:
    """Return the arms that can be compared, those with averaged weights among them."""
    names = [name for name in dict.fromkeys(row["arm"] for row in rows) if WEIGHTED not in name]
    averaged = [
        f"{name} at {share}"
        for name in names
        for share in SHARES
        if scores_of(rows, f"{name} at {share}", TARGET)
    ]
    others = [name for name in (*names, *averaged) if name not in (PLAIN, *BASELINES.values())]
    return [
        name
        for name in others
        if all(differences(rows, name, BASELINES.get(name, PLAIN), one) for one in OUTCOMES)
    ]


def arms(rows: Sequence[Cells]) -> str:
    """Return a table of the arms of the second tier."""
    title = f"## What else, with few images and {len(SECOND_SEEDS)} seeds"
    return table(rows, f"{title}\n\n{FEW_SEEDS}")


def fresh(rows: Sequence[Cells]) -> str:
    """Return a table of the arms that were tried again on seeds that chose nothing."""
    return table(rows, f"## Again, on {len(FRESH_SEEDS)} fresh seeds")


def everything(rows: Sequence[Cells]) -> str:
    """Return a table of the arms of the third tier."""
    every = [row for row in rows if row["images"] == "all"]
    return table(every, f"## With all images\n\n{FEW_SEEDS}")


def table(rows: Sequence[Cells], heading: str) -> str:
    """Return a table of the effects of all arms that there are."""
    lines = [heading, ""]
    lines += ["| arm − plain, points | pairs | " + " | ".join(OUTCOMES.values()) + " |"]
    lines += ["|---" * (len(OUTCOMES) + 2) + "|"]
    found = {arm: effects(rows, arm) for arm in arms_of(rows)}
    for arm, values in sorted(found.items(), key=lambda item: -item[1][TARGET].mean):
        cells = " | ".join(map(interval, values.values()))
        lines.append(f"| {arm} | {values[TARGET].pairs} | {cells} |")
    return "\n".join(lines) if found else ""


def effects(rows: Sequence[Cells], arm: str) -> dict[str, Effect]:
    """Return the effect of an arm on every outcome."""
    baseline = BASELINES.get(arm, PLAIN)
    return {name: effect(differences(rows, arm, baseline, name)) for name in OUTCOMES}


def forest(rows: Sequence[Cells], path: Path) -> None:
    """Draw the effect of every arm with its interval, and the domains as dots."""
    found = {arm: effects(rows, arm)[TARGET] for arm in arms_of(rows)}
    if not found:
        return
    order = sorted(found, key=lambda arm: found[arm].mean)
    with figure_files(path, size=(PAGE, 0.9 + 0.17 * len(order))) as (figure, axes):
        panel = axes[0, 0]
        panel.axvspan(-LEAST_EFFECT, LEAST_EFFECT, color=BAND, linewidth=0)
        panel.axvline(0, color="black", linewidth=0.6)
        for place, arm in enumerate(order):
            one = found[arm]
            panel.plot([one.low, one.high], [place, place], "-", color=BLUE)
            panel.plot(one.mean, place, "o", color=BLUE)
            panel.plot([*one.domains.values()], [place] * len(one.domains), **DOMAIN)
        panel.set_yticks(range(len(order)), [f"{arm} ({found[arm].pairs})" for arm in order])
        panel.set(xlabel="target IoU above plain [points]", ylim=(-0.7, len(order) - 0.3))
        handles = {
            "mean of domains, 95 % interval": Line2D([], [], color=BLUE, marker="o", linestyle="-"),
            "a domain": Line2D([], [], **DOMAIN),
            f"less than ±{LEAST_EFFECT:g} points": Patch(color=BAND, linewidth=0),
        }
        show_legend(figure, handles)


def front(rows: Sequence[Cells], path: Path) -> None:
    """Draw what each arm keeps of the source against what it gains on the target."""
    arms = {arm: effects(rows, arm) for arm in arms_of(rows)}
    if not arms:
        return
    height = max(2.6, 0.5 + 0.13 * len(arms))
    with figure_files(path, size=(PAGE, height), ncols=2, sharey=True) as (figure, axes):
        for panel, kept in zip(axes[0], (BOX, POINT), strict=True):
            panel.axhline(0, color="black", linewidth=0.6)
            panel.axvline(0, color="black", linewidth=0.6)
            for number, (arm, values) in enumerate(arms.items(), start=1):
                place = values[kept].mean, values[TARGET].mean
                panel.plot(*place, **(AVERAGED if " at " in arm else TRAINED))
                offset = {"xytext": (2, 2), "textcoords": "offset points", "fontsize": 6}
                panel.annotate(str(number), place, **offset)
            panel.set_xlabel(f"{OUTCOMES[kept]}, above plain [points]")
        axes[0, 0].set_ylabel("target IoU above plain [points]")
        names = [f"{number}  {arm}" for number, arm in enumerate(arms, start=1)]
        looks = [AVERAGED if " at " in arm else TRAINED for arm in arms]
        handles = [Line2D([], [], **look) for look in looks]
        figure.legend(handles, names, loc="outside right center", labelspacing=0.2, fontsize=6.5)


def weights(rows: Sequence[Cells], path: Path) -> None:
    """Draw the scores over both weights of the loss."""
    found: dict[str, Mapping[tuple[str, str], Sequence[float]]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        scores = scores_of(rows, arm, TARGET) if WEIGHTED in arm else {}
        if scores:
            domain = next(iter(scores))[0]
            name = arm.removeprefix(WEIGHTED).replace(" and ", ", ")
            found[name] = {(domain, "iou"): [*scores.values()]}
    if found:
        draw("figure6", found, path)


if __name__ == "__main__":
    main()
