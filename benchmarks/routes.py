"""Every route to the entropy, accuracy against time: `python benchmarks/routes.py`.

Writes `results/routes-<device>.md` and its plots. Against Eq. 1 by `torch.linalg.eigvalsh` in
float32 on the same matrix in the same run; errors are those of the values against the definition in
float64. Many samples take half an hour on two CPU cores: `--largest 65536` leaves out the most.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from measure import DEVICE, bandwidth, synchronize
from renyi_kd import (
    SampleGram,
    linear_kernel,
    rbf_kernel,
    renyi_entropy,
    renyi_entropy_estimate,
    renyi_mutual_information,
)
from renyi_kd.information.routes.tiles import tiled_kernels
from run import device_name
from textbook import entropy_by_eigenvalues

FOLDER = Path(__file__).parent
SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
BANDWIDTH = 8.0  # about the median distance of 32 normal variables
COLORS = ["#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]


class Row(NamedTuple):
    """One route at one n."""

    route: str
    n: int
    forward: float
    both: float
    error: float
    floor: float = float("nan")


def main() -> None:
    """Measure, and write table and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--largest", type=int, default=262144, help="number of samples")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    bytes_a_second = bandwidth()
    rows = [row for n in options.sizes for row in matrix_rows(n, bytes_a_second)]
    tradeoff = option_rows(options.sizes[-1])
    sections = [
        head(bytes_a_second),
        matrix_table(rows),
        tradeoff_table(tradeoff, options.sizes[-1]),
    ]
    name = "routes-" + re.sub(r"\W+", "-", device_name().lower()).strip("-")
    target = options.results / f"{name}.md"
    plot(rows, tradeoff, options.sizes[-1]).savefig(target.with_suffix(".png"), dpi=120)
    sections.append(f"![time by n, and error by time]({name}.png)\n")
    target.write_text("\n".join(sections))  # before the hour of many samples
    sections.append(many_samples_table(options.largest))
    target.write_text("\n".join(sections))
    print(target.read_text())


def timed(call: Callable[[], object], seconds: float = 2.0) -> float:
    """Median seconds of some calls, after one to warm up."""
    seconds *= 1 if DEVICE.type == "cpu" else 0.1
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 30):
        synchronize()
        start = perf_counter()
        call()
        synchronize()
        times.append(perf_counter() - start)
    return median(times)


def both_passes(
    entropy: Callable[[Tensor], Tensor], argument: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without a graph, and forward with backward."""
    leaf = argument.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return entropy(argument)

    return forward, lambda: torch.autograd.grad(entropy(leaf), leaf)


def matrix_rows(n: int, bytes_a_second: float) -> list[Row]:
    """All routes at one n: of an RBF matrix of 16 dimensions, and of samples of 64."""
    torch.manual_seed(0)
    gram = rbf_kernel(torch.randn(n, 16, device=DEVICE))
    samples = torch.randn(n, 64, device=DEVICE)
    read = gram.nbytes / bytes_a_second
    routes: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, float]] = {
        "textbook, α = 1.01": (lambda k: entropy_by_eigenvalues(k / k.trace(), 1.01), gram, 1.01),
        "eigvalsh, α = 1.01": (lambda k: renyi_entropy(k, 1.01), gram, 1.01),
        "frobenius, α = 2": (lambda k: renyi_entropy(k, 2), gram, 2),
        "power, α = 3": (lambda k: renyi_entropy(k, 3), gram, 3),
        "power, α = 5": (lambda k: renyi_entropy(k, 5), gram, 5),
    }
    if n > 128:
        routes |= {
            f"lanczos, α = {alpha}": (
                lambda k, alpha=alpha: renyi_entropy_estimate(k, alpha=alpha).bits,
                gram,
                alpha,
            )
            for alpha in (1.5, 3.5)
        }
    if n > 64:
        routes |= {
            f"dual, d = 64, α = {alpha}": (
                lambda x, alpha=alpha: renyi_entropy(SampleGram(x), alpha),
                samples,
                alpha,
            )
            for alpha in (0.1, 0.5, 1, 2, 2.5)
        }
    definitions = {
        id(gram): torch.linalg.eigvalsh(gram.double()),
        id(samples): torch.linalg.eigvalsh(linear_kernel(samples.double())),
    }
    rows = []
    for route, (entropy, argument, alpha) in routes.items():
        forward, both = both_passes(entropy, argument)
        exact = from_spectrum(definitions[id(argument)], alpha)
        torch.manual_seed(1)  # not as the samples were
        draws = 5 if route.startswith("lanczos") else 1
        error = max(abs(forward().item() - exact) for _ in range(draws))
        seconds = 8.0 if n > 2048 else 1.0
        # Forward reads the matrix, backward reads it and writes its gradient.
        floor = 3 * read if argument is gram else float("nan")
        rows.append(Row(route, n, timed(forward, seconds), timed(both, seconds), error, floor))
        print(rows[-1], file=sys.stderr)
    return rows


def from_spectrum(eigenvalues: Tensor, alpha: float) -> float:
    """Eq. 1 in float64; eigenvalues that are rounding count as zero."""
    p = eigenvalues[eigenvalues > len(eigenvalues) * 2e-16 * eigenvalues.max()]
    p = p / p.sum()
    if alpha == 1:
        return -(p * p.log2()).sum().item()
    return (p**alpha).sum().log2().item() / (1 - alpha)


def option_rows(n: int) -> list[tuple[float, str, float, float, float]]:
    """Order, options, forward seconds, largest error of ten draws, mean estimate of it."""
    torch.manual_seed(0)
    gram = rbf_kernel(torch.randn(n, 16, device=DEVICE))
    spectrum = torch.linalg.eigvalsh(gram.double())
    found = []
    for alpha in (1.5, 2.5, 3.5):
        exact = from_spectrum(spectrum, alpha)
        for rank, probes in [(8, 8), (16, 8), (32, 16), (64, 32), (128, 32), (256, 64)]:
            if rank + probes >= n:
                continue
            estimate = partial(
                renyi_entropy_estimate,
                gram,
                alpha=alpha,
                rank=rank,
                probes=probes,
                generator=torch.Generator(DEVICE).manual_seed(1),
            )
            draws = [estimate() for _ in range(10)]
            error = max(abs(draw.bits.item() - exact) for draw in draws)
            claimed = sum(draw.error.item() for draw in draws) / len(draws)
            found.append((alpha, f"{rank} + {probes}", timed(estimate), error, claimed))
            print(found[-1], file=sys.stderr)
    return found


def many_samples_table(largest: int) -> str:
    """Streaming and estimates where no matrix would fit, RBF kernels of 32 dimensions."""
    lines = [
        "## Many samples",
        "",
        "RBF kernels of 32 dimensions, float32, never as a matrix. *Kernel blocks*: evaluating all "
        "blocks of both kernels once, by `rbf_kernel` and as the library does in streaming; "
        "*memory*: the largest resident set of the process so far.",
        "",
        "| n | what | seconds | × kernel blocks (`rbf_kernel`) | × kernel blocks (streaming's) "
        "| memory | error estimate, bits |",
        "|---|---|---|---|---|---|---|",
    ]

    n = 4096
    while n <= largest:
        torch.manual_seed(0)
        x = torch.randn(n, 32, device=DEVICE)
        y = x + torch.randn(n, 32, device=DEVICE)
        grams = [SampleGram(z.requires_grad_(), rbf_kernel, bandwidth=BANDWIDTH) for z in (x, y)]
        for cells in sample_cells(grams, n):
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            *cells, error = cells
            lines.append(f"| {n} | {' | '.join(cells)} | {memory:.1f} GB | {error} |")
            print(lines[-1], file=sys.stderr)
        n *= 4
    return "\n".join([*lines, ""])


def sample_cells(grams: list[SampleGram], n: int) -> Iterator[tuple[str, ...]]:
    """What, seconds, two ratios and an error, of one number of samples."""
    clock = once if n > 20000 else timed
    if n <= 65536:
        public, own = (clock(partial(kernel_blocks, grams, of)) for of in (False, True))

        def both() -> object:
            return torch.autograd.grad(renyi_mutual_information(*grams), [x.x for x in grams])

        with torch.no_grad():
            forward = clock(partial(renyi_mutual_information, *grams))
        for what, seconds in (("forward", forward), ("forward and backward", clock(both))):
            ratios = f"{seconds / public:.2f}", f"{seconds / own:.2f}"
            yield f"I, α = 2, {what}", f"{seconds:.3g}", *ratios, "exact"
    with torch.no_grad():
        seconds = clock(partial(renyi_entropy, grams[0]))
        yield "S, α = 2, forward", f"{seconds:.3g}", "", "", "exact"
        for alpha in (3.5,) if n > 20000 else (1.5, 3.5):
            errors = []

            def estimate(alpha: float = alpha, errors: list[float] = errors) -> None:
                errors.append(renyi_entropy_estimate(grams[0], alpha=alpha).error.item())

            seconds = clock(estimate)
            claimed = f"{median(errors):.1e}"
            yield f"S, α = {alpha}, lanczos, forward", f"{seconds:.3g}", "", "", claimed


def once(call: Callable[[], object]) -> float:
    """Seconds of a call that takes too long to repeat."""
    synchronize()
    start = perf_counter()
    call()
    synchronize()
    return perf_counter() - start


def kernel_blocks(grams: list[SampleGram], own: bool, size: int = 1024) -> None:
    """All blocks of the kernels, once."""
    n = grams[0].shape[-1]
    slices = [slice(i, i + size) for i in range(0, n, size)]
    with torch.no_grad():
        for gram in grams:
            (matrix,), _ = tiled_kernels([gram])
            for i in slices:
                for j in slices:
                    if own:
                        matrix[i, j]
                    else:
                        gram.kernel(gram.x[i], gram.x[j], **gram.kernel_options)


def head(bytes_a_second: float) -> str:
    """What was measured, on what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER
    ).stdout.strip()
    command = " ".join(["python benchmarks/routes.py", *sys.argv[1:]])
    return (
        f"# {device_name()}\n\n`{command}`, torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}, commit {commit or 'unknown'}. Medians. A copy moved "
        f"{bytes_a_second / 1e9:.0f} GB/s.\n"
    )


def matrix_table(rows: list[Row]) -> str:
    """Times, ratios and errors of all routes."""
    reference = {row.n: row for row in rows if row.route.startswith("textbook")}
    lines = [
        "## One n × n matrix",
        "",
        "An RBF Gram matrix of 16 dimensions in float32, or (*dual*) samples of 64 dimensions; "
        "× textbook: how many times faster than Eq. 1 by float32 `eigvalsh`; × floor: how many "
        "times slower, both passes, than two reads of the matrix and one write of its gradient; "
        "error: of the value, of estimates the largest of five draws.",
        "",
        "| n | route | forward, ms | × textbook | forward + backward, ms | × textbook | × floor "
        "| error, bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        textbook = reference[row.n]
        floor = f"{row.both / row.floor:.3g}" if row.floor == row.floor else ""
        ratios = textbook.forward / row.forward, textbook.both / row.both
        lines.append(
            f"| {row.n} | {row.route} | {1e3 * row.forward:.3g} | {ratios[0]:.3g} "
            f"| {1e3 * row.both:.3g} | {ratios[1]:.3g} | {floor} | {row.error:.1e} |"
        )
    return "\n".join([*lines, ""])


def tradeoff_table(tradeoff: list[tuple[float, str, float, float, float]], n: int) -> str:
    """What more vectors cost and bring."""
    lines = [
        f"## Estimates at n = {n}",
        "",
        "The RBF matrix of 16 dimensions, forward; the largest error of ten draws.",
        "",
        "| α | rank + probes | ms | error, bits | estimate of it |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {alpha} | {options} | {1e3 * seconds:.3g} | {error:.1e} | {claimed:.1e} |"
        for alpha, options, seconds, error, claimed in tradeoff
    ]
    return "\n".join([*lines, ""])


def plot(
    rows: list[Row], tradeoff: list[tuple[float, str, float, float, float]], n: int
) -> plt.Figure:
    """Time by n, and error by time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = [name for name in dict.fromkeys(row.route for row in rows) if "α = 0" not in name]
    names = [name for name in names if name not in ("dual, d = 64, α = 1", "dual, d = 64, α = 2")]
    for name, color in zip(names, COLORS, strict=True):
        curve = sorted((row.n, 1e3 * row.both) for row in rows if row.route == name)
        left.plot(*zip(*curve, strict=True), "o-", color=color, label=name, markersize=4)
        (point,) = [row for row in rows if row.route == name and row.n == n]
        if not name.startswith("lanczos"):
            right.plot(1e3 * point.forward, max(point.error, 1e-9), "s", color=color, label=name)
    for alpha, color in ((1.5, "#E69F00"), (2.5, "#999999"), (3.5, "#D55E00")):
        curve = [(1e3 * seconds, error) for of, _, seconds, error, _ in tradeoff if of == alpha]
        label = f"lanczos, α = {alpha}, by rank"
        right.plot(*zip(*curve, strict=True), "o-", color=color, label=label, markersize=4)
    left.set(title="Forward and backward", xlabel="n", ylabel="ms", xscale="log", yscale="log")
    right.set(
        title=f"n = {n}, forward",
        xlabel="ms",
        ylabel="error, bits (1e-9 and less at the bottom)",
        xscale="log",
        yscale="log",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(device_name())
    return figure


if __name__ == "__main__":
    main()
