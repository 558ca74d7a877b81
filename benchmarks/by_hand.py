"""Against the ten lines that people write by hand: `python benchmarks/by_hand.py`.

Functionals of RBF kernels of n samples of d numbers each, forward and backward, in float32. By hand
it is squared norms and one matrix product for a kernel, a division by the trace, an elementwise
product for a joint, and eigenvalues or, at order 2, a sum of squares. Both sides take turns on the
same samples, or on the same matrices. Errors are against the same lines in float64, with distances
one by one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from operator import mul
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import renyi_kd
from measure import DEVICE, in_turns, peak_memory
from renyi_kd import SampleGram, rbf_kernel
from run import device_name
from textbook import entropy_by_eigenvalues

FOLDER = Path(__file__).parent
SIZES, DIMENSIONS, ALPHAS = [16, 64, 256, 1024, 4096], [8, 64, 256, 2048], [1.01, 2.0, 3.0]
DIMENSION_OF_OTHERS = 64
LARGEST = 1024  # beyond, order 2 alone, of one dimension: eigenvalues would take hours
COLORS = {1.01: "#0072B2", 2.0: "#D55E00", 3.0: "#009E73"}


class Functional(NamedTuple):
    """The library's function, and the joint entropies that its result is a sum of."""

    of: Callable[..., Tensor]
    terms: list[tuple[int, tuple[int, ...]]]


MUTUAL = "mutual information"
FUNCTIONALS = {
    "entropy": Functional(renyi_kd.renyi_entropy, [(1, (0,))]),
    "joint entropy": Functional(renyi_kd.renyi_joint_entropy, [(1, (0, 1))]),
    "conditional entropy": Functional(
        renyi_kd.renyi_conditional_entropy, [(1, (0, 1)), (-1, (1,))]
    ),
    MUTUAL: Functional(renyi_kd.renyi_mutual_information, [(1, (0,)), (1, (1,)), (-1, (0, 1))]),
    "total correlation": Functional(
        renyi_kd.renyi_total_correlation, [(1, (0,)), (1, (1,)), (1, (2,)), (-1, (0, 1, 2))]
    ),
}


class Case(NamedTuple):
    """What is computed, of what: `source` is "samples" or "matrices"."""

    functional: str
    source: str
    alpha: float
    n: int
    d: int


class Row(NamedTuple):
    """Seconds, bytes at the peak, and errors of both sides."""

    case: Case
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
    parser.add_argument("--only", choices=FUNCTIONALS, nargs="+", default=list(FUNCTIONALS))
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    cases = [
        Case(functional, source, alpha, n, d)
        for functional, source in product(options.only, ("samples", "matrices"))
        for alpha, n, d in product(options.alphas, options.sizes, options.dimensions)
        if (functional, source) == (MUTUAL, "samples") or d == DIMENSION_OF_OTHERS
        if n <= LARGEST or (alpha == 2 and d == DIMENSION_OF_OTHERS)
    ]
    rows = [measure(case, options.rounds) for case in cases]
    slug = re.sub(r"\W+", "-", device_name().lower()).strip("-")
    target = options.results / f"by-hand-{slug}.md"
    plot(rows).savefig(target.with_suffix(".png"), dpi=120)
    target.write_text(f"{head()}\n{table(rows)}\n![time by n]({target.stem}.png)\n")
    print(target.read_text())


def by_hand(
    terms: list[tuple[int, tuple[int, ...]]], kernels: Sequence[Tensor], alpha: float
) -> Tensor:
    """What public code has."""
    grams = [kernel / kernel.trace() for kernel in kernels]
    bits = []
    for sign, subset in terms:
        joint = reduce(mul, (grams[v] for v in subset))
        joint = joint / joint.trace() if len(subset) > 1 else joint
        bits.append(sign * entropy_by_hand(joint, alpha))
    return sum(bits)


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


def our_kernel(x: Tensor, bandwidth: float) -> SampleGram:
    """The RBF kernel, whose matrix is made if it is needed."""
    return SampleGram(x, rbf_kernel, bandwidth=bandwidth)


def exact_kernel(x: Tensor, bandwidth: float) -> Tensor:
    """The RBF kernel with distances one by one."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return ((distances / bandwidth).square() / -2).exp()


def measure(case: Case, rounds: int) -> Row:
    """Measure one cell. The variables share half of what they are made of."""
    functional, bandwidth = FUNCTIONALS[case.functional], 2 * case.d**0.5  # about the median
    torch.manual_seed(0)
    count = max(v for _, subset in functional.terms for v in subset) + 1
    shared, *own = torch.randn(1 + count, case.n, case.d, device=DEVICE)
    leaves = [(shared + each).requires_grad_() for each in own]
    if case.source == "matrices":
        leaves = [exact_kernel(x, bandwidth).detach().requires_grad_() for x in leaves]

    def step(
        kernel: Callable[..., Tensor], of_kernels: Callable[..., Tensor], leaves: list[Tensor]
    ) -> list[Tensor]:
        made = case.source == "samples"
        kernels = [kernel(x, bandwidth=bandwidth) for x in leaves] if made else leaves
        bits = of_kernels(kernels)
        return [bits.detach(), *torch.autograd.grad(bits, leaves)]

    hand = partial(by_hand, functional.terms, alpha=case.alpha)
    sides = {
        "by hand": partial(step, kernel_by_hand, hand),
        "ours": partial(step, our_kernel, lambda k: functional.of(*k, alpha=case.alpha)),
    }
    times = in_turns({name: partial(side, leaves) for name, side in sides.items()}, rounds)
    exact = step(exact_kernel, hand, [x.detach().double().requires_grad_() for x in leaves])
    found = [side(leaves) for side in sides.values()]
    errors = [abs((bits.double() - exact[0]).item()) for bits, *_ in found]
    slopes = [relative(gradients, exact[1:]) for _, *gradients in found]
    memory = [peak_memory(partial(side, leaves)) for side in sides.values()]
    return Row(case, *times.values(), *memory, *errors, *slopes)


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest |found - exact| / |exact| of two lists of gradients."""
    pairs = zip(found, exact, strict=True)
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


def head() -> str:
    """What was measured, on what."""
    return (
        f"# Against what people write by hand\n\n{device_name()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; float32, forward and backward, medians of turns in "
        "one run.\n"
    )


def table(rows: list[Row]) -> str:
    """All rows."""
    lines = [
        "| | of | α | n | d | by hand, ms | ours, ms | × faster | memory, × by hand "
        "| error by hand, bits | error, bits | gradient by hand | gradient |",
        "|" + "---|" * 13,
    ]
    lines += [
        (
            f"| {r.case.functional} | {r.case.source} | {r.case.alpha:g} | {r.case.n} | {r.case.d} "
            f"| {1e3 * r.by_hand:.2f} | {1e3 * r.ours:.2f} | {r.by_hand / r.ours:.2f} "
            f"| {r.memory / max(r.memory_by_hand, 1):.1f} "
            f"| {r.error_by_hand:.0e} | {r.error:.0e} "
            f"| {r.gradient_error_by_hand:.0e} | {r.gradient_error:.0e} |"
        )
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> plt.Figure:
    """Time by n of both sides, of mutual information from samples."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for alpha in dict.fromkeys(row.case.alpha for row in rows):
        some = [
            row
            for row in rows
            if row.case[:3] == (MUTUAL, "samples", alpha) and row.case.d == DIMENSION_OF_OTHERS
        ]
        sizes, color = [row.case.n for row in some], COLORS.get(alpha, "#000000")
        axis.plot(sizes, [1e3 * r.ours for r in some], "o-", color=color, label=f"α = {alpha:g}")
        axis.plot(sizes, [1e3 * r.by_hand for r in some], "o:", color=color)
    axis.plot([], [], ":", color="#666666", label="by hand")
    axis.set(xscale="log", yscale="log", xlabel="n", ylabel="ms")
    axis.set_title(f"{MUTUAL}, forward and backward, d = {DIMENSION_OF_OTHERS}")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
