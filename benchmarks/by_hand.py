"""Against the ten lines that people write by hand: `python benchmarks/by_hand.py`.

The mutual information of two variables, by RBF kernels of n samples of d numbers each, forward and
backward to the samples, in float32. By hand it is squared norms and one matrix product for the
kernel, a division by the trace, an elementwise product for the joint, and eigenvalues or, at order
2, a sum of squares. Both sides take turns on the same samples. Errors are against the same lines in
float64, with distances one by one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from measure import DEVICE, in_turns, peak_memory
from renyi_kd import rbf_kernel, renyi_mutual_information
from run import device_name
from textbook import entropy_by_eigenvalues

FOLDER = Path(__file__).parent
SIZES, DIMENSIONS, ALPHAS = [16, 64, 256, 512, 1024], [8, 64, 256, 2048], [1.01, 2.0, 3.0]
COLORS = {1.01: "#0072B2", 2.0: "#D55E00", 3.0: "#009E73"}
Pair = tuple[Tensor, Tensor]


class Row(NamedTuple):
    """One cell of the grid: seconds, bytes at the peak, and errors of both sides."""

    n: int
    d: int
    alpha: float
    by_hand: float
    ours: float
    memory_by_hand: int
    memory: int
    error_by_hand: float
    error: float
    gradient_error_by_hand: float
    gradient_error: float


def main() -> None:
    """Measure, and write table and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    rows = [
        measure(n, d, alpha, options.rounds)
        for alpha in options.alphas
        for n in options.sizes
        for d in options.dimensions
    ]
    name = "by-hand-" + re.sub(r"\W+", "-", device_name().lower()).strip("-")
    target = options.results / f"{name}.md"
    plot(rows).savefig(target.with_suffix(".png"), dpi=120)
    target.write_text(f"{head()}\n{table(rows)}\n![time by n]({name}.png)\n")
    print(target.read_text())


def information_by_hand(samples: Pair, bandwidth: float, alpha: float) -> Tensor:
    """What public code has."""
    a, b = (kernel_by_hand(x, bandwidth) for x in samples)
    a, b = a / a.trace(), b / b.trace()
    joint = a * b
    joint = joint / joint.trace()
    return entropy_by_hand(a, alpha) + entropy_by_hand(b, alpha) - entropy_by_hand(joint, alpha)


def kernel_by_hand(x: Tensor, bandwidth: float) -> Tensor:
    """The RBF kernel by one matrix product."""
    norms = x.square().sum(1)
    squares = (norms[:, None] + norms[None, :] - 2 * x @ x.T).clamp(min=0)
    return (-squares / (2 * bandwidth**2)).exp()


def entropy_by_hand(gram: Tensor, alpha: float) -> Tensor:
    """Eq. 1, at order 2 by a sum of squares."""
    if alpha == 2:
        return -gram.square().sum().log2()
    return entropy_by_eigenvalues(gram, alpha)


def exact_information(samples: Pair, bandwidth: float, alpha: float) -> Tensor:
    """The same in float64, with distances one by one."""
    a, b = (
        (torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / bandwidth)
        .square()
        .div(-2)
        .exp()
        .div(len(x))
        for x in samples
    )
    joint = a * b * len(a)
    return entropy_by_hand(a, alpha) + entropy_by_hand(b, alpha) - entropy_by_hand(joint, alpha)


def our_information(samples: Pair, bandwidth: float, alpha: float) -> Tensor:
    """The library's one call."""
    grams = (rbf_kernel(x, bandwidth=bandwidth) for x in samples)
    return renyi_mutual_information(*grams, alpha=alpha)


def measure(n: int, d: int, alpha: float, rounds: int) -> Row:
    """Measure one cell. The two variables share half of what they are made of."""
    torch.manual_seed(0)
    shared, *own = torch.randn(3, n, d, device=DEVICE)
    samples = [(shared + each).requires_grad_() for each in own]
    bandwidth = 2 * d**0.5  # about the median distance

    def step(information: Callable[[Pair, float, float], Tensor], leaves: list[Tensor]) -> list:
        bits = information(tuple(leaves), bandwidth, alpha)
        return [bits.detach(), *torch.autograd.grad(bits, leaves)]

    sides = {"by hand": information_by_hand, "ours": our_information}
    times = in_turns({name: partial(step, f, samples) for name, f in sides.items()}, rounds)
    exact = step(exact_information, [x.detach().double().requires_grad_() for x in samples])
    found = {name: step(information, samples) for name, information in sides.items()}
    errors = [abs((found[name][0].double() - exact[0]).item()) for name in sides]
    slopes = [relative(found[name][1:], exact[1:]) for name in sides]
    memory = [peak_memory(partial(step, f, samples)) for f in sides.values()]
    return Row(n, d, alpha, *times.values(), *memory, *errors, *slopes)


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest |found - exact| / |exact| of two lists of gradients."""
    pairs = zip(found, exact, strict=True)
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


def head() -> str:
    """What was measured, on what."""
    return (
        f"# Mutual information against what people write by hand\n\n{device_name()}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; float32, forward and backward, "
        "medians of turns in one run.\n"
    )


def table(rows: list[Row]) -> str:
    """All rows."""
    lines = [
        "| α | n | d | by hand, ms | ours, ms | × faster | memory, × by hand | error by hand, bits "
        "| error, bits | gradient by hand | gradient |",
        "|" + "---|" * 11,
    ]
    lines += [
        (
            f"| {r.alpha:g} | {r.n} | {r.d} | {1e3 * r.by_hand:.2f} | {1e3 * r.ours:.2f} "
            f"| {r.by_hand / r.ours:.2f} | {r.memory / max(r.memory_by_hand, 1):.1f} "
            f"| {r.error_by_hand:.0e} | {r.error:.0e} "
            f"| {r.gradient_error_by_hand:.0e} | {r.gradient_error:.0e} |"
        )
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> plt.Figure:
    """Time by n of both sides, at the middle dimension."""
    dimensions = sorted({row.d for row in rows})
    d = dimensions[len(dimensions) // 2]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for alpha in dict.fromkeys(row.alpha for row in rows):
        some = [row for row in rows if (row.alpha, row.d) == (alpha, d)]
        sizes, color = [row.n for row in some], COLORS.get(alpha, "#000000")
        axis.plot(sizes, [1e3 * r.ours for r in some], "o-", color=color, label=f"α = {alpha:g}")
        axis.plot(sizes, [1e3 * r.by_hand for r in some], "o:", color=color)
    axis.plot([], [], ":", color="#666666", label="by hand")
    axis.set(xscale="log", yscale="log", xlabel="n", ylabel="ms")
    axis.set_title(f"mutual information, forward and backward, d = {d}")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
