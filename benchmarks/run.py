"""Run the benchmarks and write `results/<device>.md` with its plot: `python benchmarks/run.py`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import cpuinfo
import matplotlib.pyplot as plt
import pytest
import torch

from measure import DEVICE

FOLDER = Path(__file__).parent
ROUTES = ["textbook", "eager", "compiled", "graphed", "compiled and graphed"]
ALPHAS = ["1.01", "2", "3", "5"]
# Of Okabe and Ito, told apart by the colour-blind.
COLORS = {
    "textbook": "#000000",
    "eager": "#0072B2",
    "compiled": "#009E73",
    "graphed": "#D55E00",
    "compiled and graphed": "#CC79A7",
    "floor": "#999999",
}
Results = list[dict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options, of_pytest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        quiet = ["-q", "-p", "no:cacheprovider", "--benchmark-columns=median,iqr,rounds"]
        files = [str(FOLDER / name) for name in ("bench_loss.py", "bench_entropy.py")]
        failed = pytest.main([*files, *quiet, f"--benchmark-json={path}", *of_pytest])
        measured = json.loads(path.read_text())["benchmarks"]
    results = [
        x["extra_info"] | {"time": x["stats"]["median"] / x["extra_info"]["repeats"]}
        for x in measured
    ]
    losses = [x for x in results if x["bench"] == "loss"]
    entropies = [x for x in results if x["bench"] == "entropy"]

    name = re.sub(r"\W+", "-", device_name().lower()).strip("-")
    target = options.results / f"{name}.md"
    target.write_text(report(losses, entropies, name))
    plot(losses, entropies, device_name()).savefig(target.with_suffix(".png"), dpi=120)
    print(target.read_text())
    raise SystemExit(failed)


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpuinfo.get_cpu_info()['brand_raw']} {torch.get_num_threads()} threads"


def report(losses: Results, entropies: Results, name: str) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER
    ).stdout.strip()
    command = " ".join(["python benchmarks/run.py", *sys.argv[1:]])
    lines = [
        f"# {device_name()}",
        "",
        f"`{command}`, torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"commit {commit or 'unknown'}.",
        "Medians. What the columns mean: [README](../README.md).",
        "",
        f"![time of the loss by batch, and of the entropy by n]({name}.png)",
    ]
    if losses:
        lines += loss_table(losses)
    if entropies:
        lines += entropy_table(entropies)
    return "\n".join(lines) + "\n"


def loss_table(losses: Results) -> list[str]:
    unit = "launches" if DEVICE.type == "cuda" else "calls"
    gigabytes = losses[0]["bytes_a_second"] / 1e9
    lines = [
        "",
        "## The loss, forward and backward, at 64 × 64 × 256",
        "",
        f"Bandwidth of a copy in the same run: {gigabytes:.0f} GB/s.",
        "",
        f"| B | α | layout | route | ms | × textbook | × floor | memory | {unit} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = defaultdict(dict)
    for x in losses:
        groups[x["batch"], x["layout"], x["alpha"]][x["route"]] = x
    for (batch, layout, alpha), routes in sorted(groups.items()):
        for route in ROUTES:
            if route not in routes:
                continue
            x = routes[route]
            reference = routes.get("textbook", {}).get("time", float("nan"))
            memory = f"{x['extra_bytes'] / x['map_bytes']:.2f}" if "extra_bytes" in x else ""
            lines.append(
                f"| {batch} | {alpha} | {layout} | {route} | {1e3 * x['time']:.3g} "
                f"| {reference / x['time']:.1f} | {x['time'] / x['floor']:.1f} "
                f"| {memory} | {x['launches']} |"
            )
    return lines


def entropy_table(entropies: Results) -> list[str]:
    lines = [
        "",
        "## The entropy of one n × n Gram matrix",
        "",
        "Milliseconds, and in brackets how many times faster than Eq. 1 by `eigvalsh` in float32.",
        "",
        "| n | | textbook | " + " | ".join(f"α = {alpha}" for alpha in ALPHAS) + " |",
        "|---|---|---|" + "---|" * len(ALPHAS),
    ]
    groups = defaultdict(dict)
    for x in entropies:
        groups[x["n"], x["backward"]][x["route"]] = x["time"]
    for (n, backward), times in sorted(groups.items()):
        reference = times.get("textbook", float("nan"))
        cells = [
            f"{1e3 * times[alpha]:.3g} ({reference / times[alpha]:.1f})" if alpha in times else ""
            for alpha in ALPHAS
        ]
        what = "forward+backward" if backward else "forward"
        lines.append(f"| {n} | {what} | {1e3 * reference:.3g} | " + " | ".join(cells) + " |")
    return lines


def plot(losses: Results, entropies: Results, name: str) -> plt.Figure:
    both = (plot_losses, losses), (plot_entropies, entropies)
    panels = [(draw, results) for draw, results in both if results]
    size = (5.5 * len(panels), 4.2)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axes, (draw, results) in zip(all_axes[0], panels, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        draw(axes, results)
        axes.set_ylabel("ms")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(name)
    return figure


def plot_losses(axes: plt.Axes, losses: Results) -> None:
    at_order_2 = [x for x in losses if x["alpha"] == 2 and x["layout"] == "channels first"]
    for route in ROUTES:
        curve = sorted((x["batch"], 1e3 * x["time"]) for x in at_order_2 if x["route"] == route)
        if curve:
            axes.plot(*zip(*curve, strict=True), "o-", color=COLORS[route], label=route)
    floor = sorted({(x["batch"], 1e3 * x["floor"]) for x in at_order_2})
    if floor:
        axes.plot(*zip(*floor, strict=True), "--", color=COLORS["floor"], label="memory floor")
        axes.set_xticks([batch for batch, _ in floor], [str(batch) for batch, _ in floor])
    axes.set(title="Loss, α = 2, forward and backward", xlabel="batch")


def plot_entropies(axes: plt.Axes, entropies: Results) -> None:
    styles = {"textbook": "k", "1.01": "#CC79A7", "2": "#0072B2", "3": "#009E73", "5": "#E69F00"}
    for route, color in styles.items():
        curve = sorted(
            (x["n"], 1e3 * x["time"]) for x in entropies if x["route"] == route and x["backward"]
        )
        if curve:
            label = "eigvalsh, float32" if route == "textbook" else f"α = {route}"
            axes.plot(*zip(*curve, strict=True), "o-", color=color, label=label)
    axes.set(title="Entropy, forward and backward", xlabel="n")


if __name__ == "__main__":
    main()
