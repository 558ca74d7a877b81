"""The Triton kernels one by one, and what a step launches: `python benchmarks/kernels.py`.

Prints each kernel's time, the bytes it must move and the share of a copy's bandwidth that it
reaches; then all kernels of one step of the loss by their times. `--sweep` also times other tiles.
Without a GPU the kernels run in Triton's interpreter, at a small size, which shows that the program
works and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.profiler import ProfilerActivity, profile

from bench_loss import D, features, graphed, make_steps
from measure import DEVICE, bandwidth, synchronize
from renyi_kd import InfoSAMDistiller
from renyi_kd import _triton as triton_kernels

ON_GPU = DEVICE.type == "cuda"
PIXELS = 4096 if ON_GPU else 70
Call = Callable[[], object]


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 64] if ON_GPU else [2])
    parser.add_argument("--alphas", type=float, nargs="+", default=[2, 3, 1.01])
    parser.add_argument("--no-launches", action="store_true", help="time single kernels alone")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too")
    options = parser.parse_args()
    copy = bandwidth(2048 if ON_GPU else 64)
    print(f"A copy moves {copy / 1e9:.0f} GB/s.\n")
    for batch in options.batches:
        print(f"B = {batch}, {PIXELS} pixels of {D} channels, float32, channels first\n")
        print("| kernel | µs | MB | GB/s | of a copy |\n|---|---|---|---|---|")
        for name, (call, moved) in kernels(batch).items():
            print(row(name, timed(call), moved, copy), flush=True)
        print()
    if options.sweep:
        sweep(options.batches, copy)
    orders = [] if options.no_launches else options.alphas
    for batch, alpha in itertools.product(options.batches, orders):
        print_launches(batch, alpha)


def row(name: str, seconds: float, moved: int, copy: float) -> str:
    """One line of a table."""
    speed = moved / seconds
    cells = f"{1e6 * seconds:.1f} | {moved / 1e6:.1f} | {speed / 1e9:.0f} | {speed / copy:.0%}"
    return f"| {name} | {cells} |"


def kernels(batch: int) -> dict[str, tuple[Call, int]]:
    """Each kernel with the bytes that it cannot but move."""
    torch.manual_seed(0)
    query, residual = (torch.randn(batch, 1, D, device=DEVICE) for _ in range(2))
    offset = torch.randn(batch, 1, device=DEVICE)
    # More maps than the cache of a GPU holds, in turn.
    sets = max(2, 2**28 // (4 * batch * PIXELS * D)) if ON_GPU else 2
    maps = [torch.randn(batch, D, PIXELS, device=DEVICE).mT for _ in range(sets)]
    turns = itertools.cycle(maps)
    saved = triton_kernels.scores.scores_by_kernel(maps[0], query, residual, offset, 1e-5)[1:]
    grad = torch.randn(batch, 1, PIXELS, device=DEVICE)
    size = maps[0].nbytes

    def backward(for_pixels: bool) -> object:
        return triton_kernels.scores.scores_backward_by_kernel(
            grad, next(turns), query, residual, *saved, for_pixels, True
        )

    grams = torch.randn(4, batch, 2 * batch, device=DEVICE, dtype=torch.float64)
    grams = grams @ grams.mT
    of_joint = torch.randn(5, batch, batch, device=DEVICE, dtype=torch.float64)
    found: dict[str, tuple[Call, int]] = {
        "scores": (
            lambda: triton_kernels.scores.scores_by_kernel(
                next(turns), query, residual, offset, 1e-5
            ),
            size,
        ),
        "scores, backward to the map": (lambda: backward(True), 2 * size),
        "scores, backward without it": (lambda: backward(False), size),
        "Gram matrix of the map": (
            lambda: triton_kernels.batch_gram.batch_gram_by_kernel(next(turns)),
            size,
        ),
        "joint Gram matrices": (
            lambda: triton_kernels.joint.joint_by_kernel(grams),
            9 * grams[0].nbytes,
        ),
        "joint, backward": (
            lambda: triton_kernels.joint.joint_backward_by_kernel(of_joint, grams, True),
            13 * grams[0].nbytes,
        ),
    }
    if batch <= 32:
        matrices = grams[:1].expand(5, -1, -1) / batch
        found["eigenvalues"] = (
            lambda: triton_kernels.eigenvalues.eigh_by_kernel(matrices),
            11 * grams[0].nbytes,
        )
    return found


def timed(call: Call) -> float:
    """Median seconds of a call: on a GPU of many in a graph, so that launching them is no part."""
    if not ON_GPU:
        call()
        started = perf_counter()
        call()
        return perf_counter() - started
    many = 32
    replay = graphed(lambda: [call() for _ in range(many)])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for event in events:
        event.record()
        replay()
    synchronize()
    apart = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    return median(apart) / many / 1e3


def sweep(batches: list[int], copy: float) -> None:
    """Time the kernels of the map with other tiles."""
    of_scores = triton_kernels.scores
    for batch in batches:
        print(f"B = {batch}\n\n| kernel | µs | MB | GB/s | of a copy |\n|---|---|---|---|---|")
        for tile in [4096, 8192, 16384] if ON_GPU else [2048]:
            of_scores._TILE = of_scores._BACKWARD_TILE = tile
            for name, (call, moved) in kernels(batch).items():
                if "scores" in name:
                    print(row(f"{name}, tile {tile}", timed(call), moved, copy), flush=True)
        print()


def print_launches(batch: int, alpha: float) -> None:
    """Print what one step of the loss launches, by time."""
    torch.manual_seed(0)
    distiller = InfoSAMDistiller(D, alpha=alpha).to(DEVICE)
    if not ON_GPU:
        return
    pairs = [(features(batch, "channels first"), features(batch, "channels first", train=True))]
    (step,) = make_steps("eager", distiller, pairs)
    for _ in range(3):
        step()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and "emset" not in event.name:
            times[event.name].append(event.device_time)
    number, total = sum(map(len, times.values())), sum(map(sum, times.values()))
    print(
        f"The loss, B = {batch}, α = {alpha:g}: {number} launches, {total:.0f} µs on the device\n"
    )
    print("| kernel | launches | µs |\n|---|---|---|")
    for name, of_kernel in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"| {name[:90]} | {len(of_kernel)} | {sum(of_kernel):.1f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
