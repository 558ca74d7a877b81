"""The whole loss at SAM's shape, forward and backward, against the textbook form."""

import math
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from measure import DEVICE, bandwidth, launches, peak_memory, synchronize
from renyi_kd import InfoSAMDistiller
from textbook import Pair, infosam_loss

D, H, W = 256, 64, 64
MAP = 4 * D * H * W  # bytes a sample
# Input sets in turn, of so many bytes in all that no cache holds the next one.
ROTATION = 2**28
Step = Callable[[], object]


@pytest.fixture(scope="session")
def bytes_a_second() -> float:
    return bandwidth()


@pytest.mark.parametrize(
    "route", ["textbook", "eager", "graphed", "compiled", "compiled and graphed"]
)
@pytest.mark.parametrize("alpha", [2, 3, 1.01])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("batch", [2, 4, 8, 16, 64])
def test_loss(benchmark, bytes_a_second, batch, layout, alpha, route):
    if layout == "channels last" and (batch, alpha) != (4, 2):
        pytest.skip("channels last is measured once")
    if "graphed" in route and DEVICE.type != "cuda":
        pytest.skip("graphs are CUDA's")
    if "graphed" in route and alpha == 1.01 and batch > 32:
        pytest.skip("the eigenvalues of larger matrices wait for the device")
    if "compiled" in route:
        steps = compiled_steps(batch, layout, alpha)
    else:
        steps = make_steps(route, *make_inputs(batch, layout, alpha))
    if "graphed" in route:
        steps = [graphed(step) for step in steps]
    sets = len(steps)
    repeats = 1 if DEVICE.type == "cpu" else 10
    turn = 0

    def run() -> None:
        nonlocal turn
        for _ in range(repeats):
            steps[turn % sets]()
            turn += 1
        synchronize()

    benchmark.extra_info.update(
        bench="loss",
        batch=batch,
        layout=layout,
        alpha=alpha,
        route=route,
        repeats=repeats,
        map_bytes=batch * MAP,
        # Forward reads both maps, backward reads both and writes one.
        floor=5 * batch * MAP / bytes_a_second,
        bytes_a_second=bytes_a_second,
    )
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
    benchmark.extra_info["launches"] = launches(steps[0])
    if "graphed" not in route:  # a graph holds its memory
        # One map is the gradient that is asked for.
        benchmark.extra_info["extra_bytes"] = peak_memory(steps[0]) - batch * MAP


def make_inputs(
    batch: int, layout: str, alpha: float
) -> tuple[InfoSAMDistiller, list[tuple[Pair, Pair]]]:
    torch.manual_seed(0)
    distiller = InfoSAMDistiller(D, alpha=alpha).to(DEVICE)
    sets = math.ceil(ROTATION / (2 * batch * MAP)) + 1
    pairs = [(features(batch, layout), features(batch, layout, train=True)) for _ in range(sets)]
    return distiller, pairs


@lru_cache(maxsize=1)  # two routes in turn share what took long to compile
def compiled_steps(batch: int, layout: str, alpha: float) -> list[Step]:
    torch._dynamo.reset()
    return make_steps("compiled", *make_inputs(batch, layout, alpha))


def features(batch: int, layout: str, *, train: bool = False) -> Pair:
    shape = (batch, D, H, W) if layout == "channels first" else (batch, H, W, D)
    common, tokens = torch.randn(shape[1:], device=DEVICE), torch.randn(1, D, device=DEVICE)
    image_embedding = common + torch.randn(shape, device=DEVICE)
    mask_tokens = tokens + torch.randn(batch, 1, D, device=DEVICE)
    return image_embedding.requires_grad_(train), mask_tokens.requires_grad_(train)


def make_steps(
    route: str, distiller: InfoSAMDistiller, inputs: list[tuple[Pair, Pair]]
) -> list[Step]:
    learners = list(distiller.parameters())

    def loss(teacher: Pair, student: Pair) -> torch.Tensor:
        if route != "textbook":
            return distiller(teacher, student)
        if teacher[0].shape[1] != D:
            teacher, student = ((pair[0].movedim(3, 1), pair[1]) for pair in (teacher, student))
        return infosam_loss(distiller.relation, teacher, student, distiller.alpha)

    if route == "compiled":
        loss = torch.compile(loss, fullgraph=True, dynamic=False)

    def step_of(teacher: Pair, student: Pair) -> Step:
        return lambda: torch.autograd.grad(loss(teacher, student), [*student, *learners])

    return [step_of(*pair) for pair in inputs]


def graphed(step: Step) -> Step:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    # The graph writes to them at every replay.
    graph.gradients = gradients
    return graph.replay
