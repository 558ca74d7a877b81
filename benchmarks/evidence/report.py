"""Tables and figures of the evidence, from its table of runs alone.

`python benchmarks/evidence/report.py runs.csv --output results` writes `evidence.md` and figures
beside it: `forest.png`, the effect of every arm; `front.png`, what is gained on the target against
what is kept of the source; and `weights.png`, the scores over both weights of the loss.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))

from grid import Cells, read_table
from plots import draw

RESAMPLES = 10_000
LEAST_EFFECT = 0.3  # points of IoU
PLAIN, INFOSAM = "plain", "infosam"
TARGET, BOX, POINT = "target/iou", "source_box/iou", "source_point/iou"
BOUNDARY = "target/boundary_f1_2"
OUTCOMES = {
    TARGET: "target IoU",
    BOUNDARY: "target boundary F1",
    BOX: "source IoU, box",
    POINT: "source IoU, point",
}
# What an arm is compared with: the same student and batch without a distiller.
BASELINES = {"infosam, batch 16": "plain, batch 16", "infosam, adapter": "plain, adapter"}
RATE_SEED = "100"

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
    rows = [row for row in read_table(options.runs) if row["seed"] != RATE_SEED]
    options.output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(part(rows) for part in (primary, arms, everything) if part(rows))
    print(text)
    (options.output / "evidence.md").write_text(f"{text}\n", encoding="utf-8")
    few = [row for row in rows if row["images"] != "all"]
    forest(few, options.output / "forest.png")
    front(few, options.output / "front.png")
    weights(few, options.output / "weights.png")


def scores_of(rows: Sequence[Cells], arm: str, outcome: str) -> Scores:
    """Return the scores of an arm; `plain at 0.5` is an arm whose weights were averaged."""
    name, _, share = arm.partition(" at ")
    test, metric = outcome.split("/")
    column = f"{test}/{share} averaged/{metric}" if share else outcome
    return {
        (row["domain"], row["seed"]): 100 * float(row[column])
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
    few = [row for row in rows if row["images"] != "all"]
    target = differences(few, INFOSAM, PLAIN, TARGET)
    if not target:
        return ""
    whole = effect(target)
    lines = [f"## The primary comparison: {verdict(whole)}", ""]
    lines += ["| InfoSAM − plain, points | pairs | " + " | ".join(OUTCOMES.values()) + " |"]
    lines += ["|---" * (len(OUTCOMES) + 2) + "|"]
    every = {name: differences(few, INFOSAM, PLAIN, name) for name in OUTCOMES}
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
        values = [by_domain(scores_of(few, PLAIN, name))[domain] for name in OUTCOMES]
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
    """Return the arms other than plain, those with averaged weights among them."""
    names = [name for name in dict.fromkeys(row["arm"] for row in rows) if "weights" not in name]
    averaged = [
        f"{name} at {share}"
        for name in (PLAIN, INFOSAM)
        for share in ("0.5", "0.75")
        if scores_of(rows, f"{name} at {share}", TARGET)
    ]
    return [name for name in (*names, *averaged) if name != PLAIN and "plain," not in name]


def arms(rows: Sequence[Cells]) -> str:
    """Return a table of the arms of the second tier."""
    few = [row for row in rows if row["images"] != "all"]
    return table(few, "## What else, with 24 images")


def everything(rows: Sequence[Cells]) -> str:
    """Return a table of the arms of the third tier."""
    return table([row for row in rows if row["images"] == "all"], "## With all images")


def table(rows: Sequence[Cells], title: str) -> str:
    """Return a table of the effects of all arms that there are."""
    lines = [title, "", "| arm − plain, points | pairs | " + " | ".join(OUTCOMES.values()) + " |"]
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
    figure, panel = plt.subplots(figsize=(7, 1 + 0.28 * len(order)))
    panel.axvspan(-LEAST_EFFECT, LEAST_EFFECT, color="#eeeeee")
    panel.axvline(0, color="black", linewidth=0.8)
    for place, arm in enumerate(order):
        one = found[arm]
        panel.plot([one.low, one.high], [place, place], color="#0072b2")
        panel.plot(one.mean, place, "o", color="#0072b2")
        panel.plot([*one.domains.values()], [place] * len(one.domains), ".", color="#e69f00")
    panel.set_yticks(range(len(order)), [f"{arm} ({found[arm].pairs})" for arm in order])
    panel.set_xlabel("IoU on the target, points over plain (orange: each domain)")
    save(figure, path)


def front(rows: Sequence[Cells], path: Path) -> None:
    """Draw what each arm keeps of the source against what it gains on the target."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for panel, kept in zip(panels, (BOX, POINT), strict=True):
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axvline(0, color="black", linewidth=0.8)
        for arm in arms_of(rows):
            values = effects(rows, arm)
            free = " at " in arm
            panel.plot(
                values[kept].mean,
                values[TARGET].mean,
                "s" if free else "o",
                color="#d55e00" if free else "#0072b2",
            )
            panel.annotate(arm, (values[kept].mean, values[TARGET].mean), fontsize=6)
        panel.set_xlabel(f"{OUTCOMES[kept]}, points over plain")
    panels[0].set_ylabel("target IoU, points over plain")
    save(figure, path)


def weights(rows: Sequence[Cells], path: Path) -> None:
    """Draw the scores over both weights of the loss."""
    prefix = "infosam, weights "
    found: dict[str, Mapping[tuple[str, str], Sequence[float]]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        if arm.startswith(prefix):
            scores = scores_of(rows, arm, TARGET)
            domain = next(iter(scores))[0]
            name = arm.removeprefix(prefix).replace(" and ", ", ")
            found[name] = {(domain, "iou"): [*scores.values()]}
    if found:
        draw("figure6", found, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure, and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
