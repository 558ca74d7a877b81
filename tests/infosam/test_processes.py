"""The loss over several processes against one process with all of the samples."""

import copy
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from grids import over
from torch import Tensor

from renyi_kd import InfoSAMDistiller, infosam_terms

SCRIPT = Path(ranks.__file__)


def run_on_ranks(world: int, cases: Iterable[str], folder: Path) -> list[dict]:
    """What each rank came to."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *launch, str(SCRIPT), "agree", str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_two_ranks(tmp_path) -> None:
    results = run_on_ranks(2, ranks.FAST_CASES, tmp_path)
    for name in ranks.FAST_CASES:
        assert_ranks_equal_one_process(results, name)
    assert_traffic(results)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_case(world, tmp_path) -> None:
    results = run_on_ranks(world, ranks.CASES, tmp_path)
    for name in ranks.CASES:
        assert_ranks_equal_one_process(results, name)
    assert_traffic(results)


def assert_ranks_equal_one_process(results: list[dict], name: str) -> None:
    case = ranks.CASES[name]
    expected = ranks.compute(case, len(results))
    short = case.dtype == torch.float32
    gradients = {key for key in expected if key.startswith("gradient")}
    total = torch.stack([expected[key].norm() for key in gradients]).norm()
    assert total > 0
    for found in (of_rank[name] for of_rank in results):
        assert found.keys() == expected.keys()
        for key in expected.keys() - gradients:
            torch.testing.assert_close(
                found[key],
                expected[key],
                rtol=0,
                atol=1e-6 if short else 1e-12,
                equal_nan=True,
                msg=name,
            )
        for key in gradients:
            # That of a key's bias is zero but for rounding.
            allowed = (1e-5 if short else 1e-9) * expected[key].norm()
            allowed += torch.finfo(case.dtype).eps * total
            assert (found[key] - expected[key]).norm() <= allowed, (name, key)


def assert_traffic(results: list[dict]) -> None:
    """What a rank sends, in bytes."""
    world = len(results)
    others = (world - 1) / world
    batch, dim, pixels, floats = 4, 256, 4096, 4
    embedding, relation, tokens = (batch * n * floats for n in (dim * pixels, pixels, dim))
    halves = 4 * (world * batch) * (world * batch + 1) / 2 * 8
    parameters = 132_608 * floats
    for sent in (of_rank["traffic"] for of_rank in results):
        forward, backward = sent["forward"], sent["backward"]
        assert forward["all_to_all"] == others * (embedding + 2 * relation + tokens)
        assert forward["all_reduce"] == 2 * others * (halves + 2 * 8)  # a sum and a count
        assert forward["all_gather"] == (world - 1) * 7 * 8
        assert backward["all_to_all"] == others * (2 * relation + tokens)
        assert backward["all_reduce"] == 2 * others * parameters
        grams = sum(forward.values()) + backward["all_to_all"]
        assert grams <= 1.1 * embedding + 2 * relation


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(kind: str, world: int) -> list[subprocess.Popen]:
    """Start the ranks by hand: torchrun would kill all if one ends."""
    port = free_port()
    started = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), kind],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["die", "die-in-backward", "stay-away"])
def test_a_lost_rank_is_an_error_on_the_others(kind) -> None:
    *others, lost = start(kind, 3)
    try:
        for process in others:
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "RuntimeError" in stderr
            assert "gloo" in stderr.lower() or "timed out" in stderr.lower()
    finally:
        for process in (*others, lost):
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("differ", "`teacher_relation` must have samples of one shape and dtype on all ranks"),
        ("differ-in-alpha", "`alpha` and the other options must be the same on all ranks"),
    ],
)
def test_what_differs_on_a_rank_is_an_error_on_all(kind, complaint) -> None:
    messages = []
    for process in start(kind, 3):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 4, stderr
        messages.append(stdout)
    for rank, message in enumerate(messages):
        assert message.startswith(f"ValueError {complaint}")
        assert f"on this rank, {rank}" in message
        if kind == "differ":
            assert f"but not on {'0, 1' if rank == 2 else 2}." in message


@over("kind, complaint", [("integers", "TypeError")], slow=[("raising", "ArithmeticError")])
def test_an_error_of_one_rank_is_one_on_all(kind, complaint) -> None:
    """Within seconds, and the group is as good as before."""
    *others, last = start(kind, 3)
    for process in others:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 4, stderr
        assert stdout.startswith("RuntimeError Rank 2 raised an error before its samples")
    stdout, stderr = last.communicate(timeout=60)
    assert last.returncode == 4, stderr
    assert stdout.startswith(complaint)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="needs a PyTorch that shards on CPUs"
)
def test_a_sharded_relation_trains_as_a_whole_one() -> None:
    for process in start("sharded", 2):
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 0, stderr


# One process


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", f"tcp://localhost:{free_port()}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def samples(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, 16, 5, 4), (batch, 1, 16)
    return tuple(torch.randn(shape, generator=draw).requires_grad_(seed > 0) for shape in shapes)


def distillers(group: dist.ProcessGroup) -> tuple[InfoSAMDistiller, InfoSAMDistiller]:
    alone, one_rank = InfoSAMDistiller(16), InfoSAMDistiller(16, process_group=group)
    one_rank.load_state_dict(alone.state_dict())
    return alone, one_rank


def test_a_group_of_one(group) -> None:
    alone, one_rank = distillers(group)
    found, expected = (d.terms(samples(3, 0), samples(3, 1)) for d in (one_rank, alone))
    torch.testing.assert_close(found, expected)
    found.loss.backward()
    expected.loss.backward()
    for p, q in zip(one_rank.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_copy_shares_the_group(group) -> None:
    _, distiller = distillers(group)
    copied = copy.deepcopy(distiller)
    assert copied.process_group is group
    weight = copied.relation.query_proj.weight
    assert weight is not distiller.relation.query_proj.weight
    teacher, student = samples(3, 0), samples(3, 1)
    torch.testing.assert_close(copied(teacher, student), distiller(teacher, student))
    assert "process_group=<torch" in repr(copied)


def test_a_file_holds_no_group(group) -> None:
    _, distiller = distillers(group)
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match=r"file, which holds none. Set distiller.process_group"):
        loaded(samples(3, 0), samples(3, 1))
    assert "process_group=None" in repr(loaded)
    expected = distiller(samples(3, 0), samples(3, 1))
    loaded.process_group = group
    torch.testing.assert_close(loaded(samples(3, 0), samples(3, 1)), expected)
    loaded.process_group = None
    torch.testing.assert_close(loaded(samples(3, 0), samples(3, 1)), expected)
    with pytest.raises(TypeError, match="`process_group` must be"):
        loaded.process_group = 3


@pytest.mark.slow
def test_compiled(group) -> None:
    alone, distiller = distillers(group)
    teacher, student = samples(3, 0), samples(3, 1)
    loss = torch.compile(distiller, backend="aot_eager")(teacher, student)
    torch.testing.assert_close(loss, alone(teacher, student))


def test_the_samples_of_all_ranks_are_counted(group) -> None:
    _, distiller = distillers(group)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        distiller(samples(1, 0), samples(1, 1))
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        distiller(samples(0, 0), samples(0, 1))


def test_a_single_sample_is_told_of_process_groups() -> None:
    with pytest.raises(ValueError, match="process_group="):
        InfoSAMDistiller(16)(samples(1, 0), samples(1, 1))


@pytest.mark.parametrize(
    ("process_group", "error", "message"),
    [
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, "a group that this process belongs to"),
        ("nccl", TypeError, "must be a torch.distributed.ProcessGroup, .*, got str"),
        (True, TypeError, "must be a torch.distributed.ProcessGroup, .*, got bool"),
    ],
)
def test_what_is_no_group(process_group, error, message) -> None:
    with pytest.raises(error, match=message):
        InfoSAMDistiller(16, process_group=process_group)
    relation = torch.eye(3)
    with pytest.raises(error, match=message):
        infosam_terms(relation, relation, relation, relation, process_group=process_group)
