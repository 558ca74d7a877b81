"""What `test_processes` computes on several ranks, and on one process for comparison.

As a program under torchrun, `ranks.py agree FOLDER CASE ...` runs the cases and keeps each rank's
results. Started by hand on each rank, `ranks.py die|stay-away|differ` shows what becomes of the
others.
"""

import contextlib
import datetime
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from renyi_kd import (
    DotProductRelation,
    FeatureCollector,
    InfoSAMDistiller,
    RelationModule,
    infosam_terms,
)

D = 16
SIZE = 64  # pixels of an image for a SAM
Results = dict[str, Tensor]


@dataclass
class Case:
    """One loss and its gradients, on any number of ranks."""

    dtype: torch.dtype = torch.float64
    alpha: float = 2
    shares: str = "ragged"
    student: str = "pixels"
    teacher_dtype: torch.dtype | None = None
    layouts: bool = False
    batches: int = 1
    through: str = "terms"
    relation: Callable[[], nn.Module] | None = None
    frozen: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    f"{str(dtype).removeprefix('torch.')} {alpha} {shares}": Case(dtype, alpha, shares)
    for dtype in (torch.float32, torch.float64)
    for alpha in (1.5, 2, 3)
    for shares in ("one", "two", "ragged")
} | {
    "a call": Case(through="call"),
    "terms on the first rank, calls on others": Case(through="either"),
    "functional form": Case(through="infosam_terms"),
    "student alone by distillation": Case(options={"distillation_trains_relation": False}),
    "odd relation": Case(relation=lambda: Odd()),
    "fixed relation": Case(relation=DotProductRelation),
    "frozen relation": Case(frozen=True),
    "more tokens and pixels": Case(student="more"),
    "bfloat16 teacher": Case(teacher_dtype=torch.bfloat16),
    "layouts that differ": Case(layouts=True),
    "none on the last": Case(shares="none on the last"),
    "none on the last, functional form": Case(
        shares="none on the last", through="infosam_terms", layouts=True
    ),
    "accumulated": Case(batches=3),
    "SAM": Case(torch.float32, student="SAM"),
    "checkpointed SAM": Case(torch.float32, student="checkpointed SAM"),
    "compiled SAM": Case(torch.float32, student="compiled SAM"),
}


FAST_CASES = [
    "float32 2 two",
    "float64 1.5 ragged",
    "float64 3 one",
    "terms on the first rank, calls on others",
    "functional form",
    "student alone by distillation",
    "odd relation",
    "bfloat16 teacher",
    "layouts that differ",
    "none on the last",
    "none on the last, functional form",
    "accumulated",
    "checkpointed SAM",
]


class Odd(RelationModule):
    """Buffers of all kinds, a strided parameter, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__(D)
        self.query_proj.weight = nn.Parameter(torch.randn(D, 2 * D)[:, ::2])
        self.unused = nn.Parameter(torch.randn(3))
        for dtype in (torch.int16, torch.bool, torch.float16):
            self.register_buffer(str(dtype)[6:], torch.randn(2, 3).to(dtype).T)
        self.register_buffer("empty", torch.empty(0))

    def forward(self, image_embedding: Tensor, mask_tokens: Tensor) -> Tensor:
        buffers = self.int16 + self.bool + self.float16
        return super().forward(image_embedding, mask_tokens) + 1e-3 * buffers.sum()


class Pixels(nn.Module):
    """A student without a SAM: features of images (B, 3, H, W)."""

    def __init__(self, tokens: int = 1) -> None:
        super().__init__()
        self.pixels, self.tokens = nn.Conv2d(3, D, 1), nn.Linear(3, tokens * D)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(images.mean((2, 3))).unflatten(1, (-1, D))
        return self.pixels(images), tokens


class Segmenting(nn.Module):
    """A SAM and its collector: features of images (B, 3, SIZE, SIZE)."""

    def __init__(self, checkpointed: bool) -> None:
        from models import tiny_sam  # the packages of SAMs take seconds to import

        super().__init__()
        self.sam = tiny_sam(D)
        if checkpointed:
            for block in self.sam.image_encoder.blocks:
                forward = block.forward
                block.forward = lambda x, forward=forward: checkpoint(
                    forward, x, use_reentrant=False
                )

    def forward(self, images: Tensor) -> Tensor:
        from models import segment

        boxes = torch.tensor([8.0, 8, 40, 50], dtype=images.dtype).repeat(len(images), 1)
        return segment(self.sam, images, boxes)


def make_student(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if "SAM" not in kind:
        return Pixels(tokens=2 if kind == "more" else 1)
    student = Segmenting("checkpointed" in kind)
    for name, parameter in student.named_parameters():  # DistributedDataParallel asks for it
        parameter.requires_grad_("image_encoder" in name)
    return student


def numbers_of_samples(shares: str, world: int) -> list[int]:
    """Samples of each rank."""
    return {
        "one": [1] * world,
        "two": [2] * world,
        "ragged": [1 + r % 3 for r in range(world)],
        "none on the last": [2] * (world - 1) + [0],
    }[shares]


def compute(case: Case, world: int, group: Any = None) -> Results:
    """Terms and gradients on this rank, or without a group of all samples on one process."""
    sizes = numbers_of_samples(case.shares, world)
    rank = None if group is None else dist.get_rank(group)
    own = slice(None)
    if rank is not None:
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    side = SIZE if "SAM" in case.student else 7 if case.student == "more" else 5
    grid = SIZE // 16 if "SAM" in case.student else 5

    student = make_student(case.student).to(case.dtype)
    features = student
    if "SAM" in case.student:
        collector = FeatureCollector(student)
    if "compiled" in case.student and group is not None:
        features = torch.compile(features, backend="aot_eager")
    if group is not None:
        features = DistributedDataParallel(features, process_group=group)

    torch.manual_seed(2 + (rank or 0))  # not all ranks draw the same relation module
    options = case.options | {"alpha": case.alpha, "process_group": group}
    relation = RelationModule(D) if case.relation is None else case.relation()
    distiller = InfoSAMDistiller(D, relation=relation, **options).to(case.dtype)
    distiller.requires_grad_(not case.frozen)
    if case.through == "infosam_terms" and group is not None:
        relation = DistributedDataParallel(relation, process_group=group)

    draw = torch.Generator().manual_seed(3)
    for batch in range(case.batches):
        images, embedding, tokens = (
            torch.randn(sum(sizes), *shape, generator=draw, dtype=torch.float64)[own]
            for shape in ((3, side, side), (D, grid, grid), (1, D))
        )
        embedding = embedding.to(case.teacher_dtype or case.dtype)
        if case.layouts and rank == 0:
            embedding = embedding.contiguous(memory_format=torch.channels_last)
        teacher = embedding, tokens.to(case.dtype)
        last = batch == case.batches - 1
        waits = contextlib.nullcontext() if last or group is None else features.no_sync()
        with waits:
            output = features(images.to(case.dtype))
            if "SAM" in case.student:
                output = collector.pop()
            if case.through == "infosam_terms":
                terms = infosam_terms(relation(*teacher), relation(*output), *teacher, **options)
            else:
                terms = distiller.terms(teacher, output)
            loss = terms.loss
            if case.through == "call" or (case.through == "either" and rank != 0):
                loss = distiller(teacher, output)
            elif case.through == "either":
                loss = distiller.terms(teacher, output).loss
            loss.backward()

    results = {name: value.detach() for name, value in terms._asdict().items()}
    for module, whose in ((student, "student"), (distiller, "distiller")):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                assert "unused" not in name
                results[f"gradient of {whose}.{name}"] = parameter.grad
    return results


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends to others.

    An all-reduce is counted as two rounds through a ring, which is what all backends come to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"all_to_all": 0.0, "all_reduce": 0.0, "all_gather": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            world, rank = dist.get_world_size(), dist.get_rank()
            name = func._schema.name
            if "alltoall" in name:
                _, sent, _, _, parts = args[:5]
                assert sent.ndim == 1
                own = parts[rank]
                self.sent["all_to_all"] += (len(sent) - own) * sent.itemsize
            elif "allreduce" in name:
                (tensor,) = args[0]
                self.sent["all_reduce"] += 2 * (world - 1) / world * tensor.nbytes
            elif "allgather" in name:
                (tensor,) = args[1]
                self.sent["all_gather"] += (world - 1) * tensor.nbytes
            else:
                raise AssertionError(f"uncounted: {name}")
        return func(*args, **(kwargs or {}))


def count_traffic() -> dict[str, dict[str, float]]:
    """Bytes sent by one step at the shape of a SAM, batch 4: forward, and backward."""
    batch, dim, side = 4, 256, 64
    distiller = InfoSAMDistiller(dim, process_group=dist.group.WORLD)
    teacher = torch.randn(batch, dim, side, side), torch.randn(batch, 1, dim)
    student = tuple(x.clone().requires_grad_() for x in teacher)
    with Traffic() as forward:
        loss = distiller(teacher, student)
    with Traffic() as backward:
        loss.backward()
    return {"forward": forward.sent, "backward": backward.sent}


def agree(folder: Path, names: list[str]) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    results: dict[str, Any] = {}
    for name in names:
        results[name] = compute(CASES[name], world, dist.group.WORLD)
    results["traffic"] = count_traffic()
    torch.save(results, folder / f"{rank}.pt")


def features(pixels: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(2, D, pixels, 5), torch.randn(2, 1, D)


def raising(*_: object) -> None:
    raise ArithmeticError("of this rank alone")


def misfortune(kind: str) -> None:
    """The last rank does what `kind` says in the second step."""
    distiller = InfoSAMDistiller(D, process_group=dist.group.WORLD)
    student = tuple(x.requires_grad_() for x in features())
    distiller(features(), student).backward()
    last = dist.get_rank() == dist.get_world_size() - 1
    if last and kind == "die":
        os._exit(3)
    if last and kind == "stay-away":
        time.sleep(60)
    teacher = features(7) if last and kind == "differ" else features()
    if last and kind == "integers":
        teacher = teacher[0].long(), teacher[1]
    if last and kind == "raising":
        distiller.relation.register_forward_hook(raising)
    if last and kind == "differ-in-alpha":
        distiller.alpha = 3.0
    try:
        loss = distiller(teacher, student)
        if last and kind == "die-in-backward":
            loss.register_hook(lambda grad: os._exit(3))
        loss.backward()
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        if kind not in ("differ", "differ-in-alpha", "integers", "raising"):
            raise
        print(type(error).__name__, error, flush=True)
        distiller.relation._forward_hooks.clear()
        # The group is as good as before.
        distiller.alpha = 2.0
        distiller(features(), student).backward()
        dist.barrier()
        os._exit(4)


def sharded() -> None:
    """The gradients of a relation that `fully_shard` keeps in parts are those of a whole one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for trains_relation in (True, False):
        for group in (None, dist.group.WORLD):
            torch.manual_seed(0)
            options = {"distillation_trains_relation": trains_relation, "process_group": group}
            distiller = InfoSAMDistiller(D, **options)
            whole = InfoSAMDistiller(D, **options)
            whole.load_state_dict(distiller.state_dict())
            fully_shard(distiller.relation, mesh=mesh)
            torch.manual_seed(1 + rank)
            teacher, student = features(), features()
            losses = [x(teacher, [y.requires_grad_() for y in student]) for x in (distiller, whole)]
            torch.testing.assert_close(*losses)
            for loss in losses:
                loss.backward()
            for p, q in zip(distiller.parameters(), whole.parameters(), strict=True):
                if group is None:
                    dist.all_reduce(q.grad)
                    q.grad /= world
                torch.testing.assert_close(p.grad.full_tensor(), q.grad)
                assert q.grad.abs().max() > 0 or q is whole.relation.key_proj.bias


if __name__ == "__main__":
    warnings.simplefilter("error")
    # torch.compile looks at gradients of tensors that are no leaves.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    torch.set_num_threads(1)
    kind = sys.argv[1]
    patience = datetime.timedelta(seconds=120 if kind == "agree" else 10)
    dist.init_process_group("gloo", timeout=patience)
    if kind == "sharded":
        sharded()
    elif kind == "agree":
        agree(Path(sys.argv[2]), sys.argv[3:])
    else:
        misfortune(kind)
    dist.barrier()
    os._exit(0)  # an orderly exit with gloo sometimes aborts
