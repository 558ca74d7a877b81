"""The loss over several processes, gloo on the CPU: `python benchmarks/processes.py`.

Against what is usually written by hand: every rank gathers the features of all and computes the
whole loss. Bytes are those that go through the loopback interface (Linux only).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from renyi_kd import InfoSAMDistiller, infosam_terms

DIM, SIDE, ALPHA = 256, 64, 2.0
WARM_UP, ROUNDS = 3, 15
Pair = tuple[Tensor, Tensor]


def main() -> None:
    """Start the processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="of a process")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, one thread a process, torch {torch.__version__}\n")
    print(
        "| b | processes | own samples, ms | all samples, ms | gathered, ms | × gathered | × floor "
        "| sent, MB | gathering sends, MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for batch in options.batch_sizes:
        for count in options.processes:
            if batch * count < 2:
                continue
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [sys.executable, *launch, __file__]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "BATCH": str(batch)}
            subprocess.run(command, check=True, env=environment)


def measure(batch: int) -> None:
    """Print a row of the table, on the first rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    teacher = torch.randn(batch, DIM, SIDE, SIDE), torch.randn(batch, 1, DIM)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    alone = InfoSAMDistiller(DIM, alpha=ALPHA)
    together = InfoSAMDistiller(DIM, alpha=ALPHA, process_group=dist.group.WORLD)
    together_loss = together(teacher, student)
    torch.testing.assert_close(gathered(together, teacher, student) / world, together_loss)

    steps: dict[str, Callable[[], Tensor]] = {
        "all samples": lambda: together(teacher, student),
        "gathered": lambda: gathered(together, teacher, student),
    }
    if batch > 1:
        steps["own samples"] = lambda: alone(teacher, student)
    exchanged = torch.randn(world, DIM * SIDE * SIDE)
    received = torch.empty_like(exchanged)
    times: dict[str, list[float]] = {name: [] for name in (*steps, "all-to-all")}
    sent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            took, bytes_sent = timed(lambda step=step: step().backward())
            if turn >= WARM_UP:
                times[name].append(took)
                sent[name].append(bytes_sent / world)
        if turn >= WARM_UP:
            took, _ = timed(lambda: dist.all_to_all_single(received, exchanged))
            times["all-to-all"].append(took)
    if dist.get_rank() == 0:
        ms = {name: 1e3 * median(t) for name, t in times.items() if t}
        mb = {name: median(s) / 1e6 for name, s in sent.items()}
        # The bytes that must move, as fast as a large all-to-all moves them.
        floor = "–"
        if world > 1:
            rate = (world - 1) / world * exchanged.nbytes / ms["all-to-all"]
            bound = (world - 1) / world * teacher[0].nbytes / rate
            floor = f"{ms['all samples'] / bound:.1f}"
        own = f"{ms['own samples']:.1f}" if batch > 1 else "an error"
        row = [batch, world, own, f"{ms['all samples']:.1f}", f"{ms['gathered']:.1f}"]
        row += [f"{ms['gathered'] / ms['all samples']:.1f}", floor]
        row += [f"{mb['all samples']:.2f}", f"{mb['gathered']:.2f}"]
        print("|", " | ".join(map(str, row)), "|", flush=True)
    dist.barrier()
    os._exit(0)  # an orderly exit with gloo sometimes aborts


def gathered(distiller: InfoSAMDistiller, teacher: Pair, student: Pair) -> Tensor:
    """The loss of all samples on every rank, times their number as DistributedDataParallel needs.

    The gradients of the relation module still have to be averaged.
    """
    relation = distiller.relation
    samples = relation(*teacher), relation(*student), *teacher
    return dist.get_world_size() * infosam_terms(*map(gather, samples), alpha=ALPHA).loss


def gather(own: Tensor) -> Tensor:
    """The tensors of all ranks, of which the own one has a gradient."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def timed(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds until the last rank is done, and bytes that all have sent."""
    dist.barrier()
    before = loopback()
    dist.barrier()
    start = perf_counter()
    step()
    took = torch.tensor(perf_counter() - start)
    dist.barrier()
    sent = loopback() - before
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item(), sent


def loopback() -> int:
    """Bytes that have gone through the loopback interface."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    if "BATCH" in os.environ:
        measure(int(os.environ["BATCH"]))
    else:
        main()
