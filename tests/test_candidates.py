"""Losses that were tried: each is what its name says, and trains the student alone."""

import sys
from pathlib import Path

import pytest
import torch
from finetuning_runs import build_once, make_data
from torch import Tensor

import anchoring
import candidates
from candidates import Apart
from parts.data.prompts import Prompts
from parts.distillers import choice
from parts.distillers.base import LOGITS, TOKENS, Pass
from parts.distillers.collecting import Collector
from parts.options import DISTILLERS
from parts.training.loss import structure_loss
from renyi_kd import cauchy_schwarz_divergence

PLAIN = [n for n, (kind, _) in candidates.CANDIDATES.items() if not hasattr(kind, "of_masks")]


def unit_rows(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(2, 30, 7, dtype=torch.float64), dim=-1)


def as_map(rows: Tensor) -> Tensor:
    """An embedding with these places, whose lengths do not matter."""
    return (torch.rand(2, 30, 1, dtype=torch.float64) + 0.5).mul(rows).mT.unflatten(2, (5, 6))


def passes(moved: float, batch: int = 4, seed: int = 0) -> tuple[Pass, Pass]:
    """A teacher's pass, and a student's whose features are moved."""
    torch.manual_seed(seed)
    embedding, tokens = torch.randn(batch, 64, 8, 8), torch.randn(batch, 1, 64)
    found = [(x + moved * torch.randn_like(x)).requires_grad_() for x in (embedding, tokens)]
    logits = found[0].mean(1) + found[1].mean()
    return Pass([], embedding, tokens, embedding.mean(1)), Pass([], *found, logits)


def test_anchors_are_those_of_the_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchoring, "BLOCK", 8)  # the last block is a shorter one
    rows = unit_rows(0), unit_rows(1)
    maps = [as_map(one) for one in rows]
    a, b = (one @ one.mT for one in rows)
    inner = (a * b).sum((1, 2))
    lengths = a.square().sum((1, 2)) * b.square().sum((1, 2))
    divergence = -(inner.square() / lengths).log2()
    torch.testing.assert_close(anchoring.divergence(*maps), divergence)
    torch.testing.assert_close(anchoring.by_matrices(*maps), divergence)
    torch.testing.assert_close(anchoring.squares(*maps), (a - b).square().mean((1, 2)))
    expected = (a.clamp(min=0) - b.clamp(min=0)).square().mean((1, 2))
    torch.testing.assert_close(candidates.clipped_squares(*maps), expected)
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    a, b = centre @ a @ centre, centre @ b @ centre
    cosine = (a * b).sum((1, 2)) / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()
    torch.testing.assert_close(candidates.misalignment(*maps), 1 - cosine)


@pytest.mark.parametrize("loss", [anchoring.divergence, anchoring.squares])
def test_anchors_have_the_gradient_of_their_values(loss: Apart, monkeypatch) -> None:
    monkeypatch.setattr(anchoring, "BLOCK", 8)
    student, teacher = as_map(unit_rows(0)).requires_grad_(), as_map(unit_rows(1))
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), student)


def test_anchors_of_half_precision_are_summed_in_float32() -> None:
    """As little is lost under autocast, which would round the factors of products."""
    maps = [as_map(unit_rows(seed)).bfloat16() for seed in (0, 1)]
    expected = anchoring.divergence(*(x.double() for x in maps))
    with torch.autocast("cpu", torch.bfloat16):
        found = anchoring.divergence(*maps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    student = maps[0].float().requires_grad_()
    grads = []
    for enabled in (True, False):
        loss = anchoring.squares(student, maps[1].float()).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(loss, student)
    assert torch.equal(*grads)


def test_anchors_refuse_what_they_cannot_do() -> None:
    """Maps of two sizes, and a second derivative, which would silently be zero."""
    student, teacher = as_map(unit_rows(0)).requires_grad_(), as_map(unit_rows(1))
    with pytest.raises(
        ValueError, match=r"must have the same shape, got \(2, 7, 5, 6\) and \(2, 7, 4"
    ):
        anchoring.squares(student, teacher[:, :, :4])
    loss = anchoring.squares(student, teacher).sum()
    (slope,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        slope.sum().backward()


@pytest.mark.slow
def test_the_measurement_of_anchors_runs(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    small = ["--rounds", "1", "--batch", "2", "--grid", "4", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["anchoring.py", *small])
    anchoring.main()
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| InfoSAM",
        "| divergence, D x D",
        "| squares, D x D",
        "| divergence, P x P",
    ]


def test_self_normalised_information_is_a_divergence_of_squared_matrices() -> None:
    a, b = (rows @ rows.mT / 30 for rows in (unit_rows(2), unit_rows(3)))
    expected = cauchy_schwarz_divergence(a.square(), b.square())
    torch.testing.assert_close(candidates.self_normalised(a, b), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_the_student_learns(name: str) -> None:
    """Moved features have a gradient, a teacher's have none."""
    kind, _ = candidates.CANDIDATES[name]
    distiller = kind()
    teacher, student = passes(0.3)
    for _ in range(2):  # the first of warmed steps has a weight of zero
        loss = distiller(teacher, student, torch.rand(4, 32, 32) > 0.5)
    loss.backward()
    assert student.embedding.grad.abs().sum() > 0
    assert teacher.embedding.grad is None
    assert {*kind.needs} <= {"embedding", TOKENS, LOGITS}


@pytest.mark.parametrize("name", [name for name in PLAIN if name.startswith("anchor")])
def test_an_anchor_is_lowest_at_the_teacher(name: str) -> None:
    distiller = candidates.CANDIDATES[name][0]()
    masks = torch.rand(4, 32, 32) > 0.5
    at_rest = distiller(*passes(0.0), masks).item()
    assert at_rest == pytest.approx(0, abs=1e-5)
    assert distiller(*passes(0.3), masks).item() > 1e-4


def test_a_balanced_weight_is_a_share_of_the_gradient() -> None:
    teacher, student = passes(0.3)
    masks = torch.rand(4, 32, 32) > 0.5
    of_masks, of_anchor = (
        torch.autograd.grad(loss, student.embedding, retain_graph=True)[0].norm()
        for loss in (
            structure_loss(student.logits, masks),
            candidates.Balanced()(teacher, student, masks),
        )
    )
    torch.testing.assert_close(of_anchor, candidates.SHARE * of_masks)


def test_weights_rise_and_fall() -> None:
    warmed, faded = candidates.Warmed(), candidates.Faded()
    assert [warmed.weight(x) for x in (0, 1 / 6, 1)] == [0, 0.5, 1]
    assert [faded.weight(x) for x in (0, 0.5, 1, 2)] == [1, 0.5, 0, 0]


@pytest.mark.parametrize("name", ["batch-divergence", "batch-information"])
def test_a_divergence_over_the_batch_is_lowest_at_the_teacher(name: str) -> None:
    """And nothing but the student could make it low."""
    distiller = candidates.CANDIDATES[name][0]()
    assert not [*distiller.parameters()]
    masks = torch.ones(4, 32, 32) > 0
    assert distiller(*passes(0.0), masks).item() == pytest.approx(0, abs=1e-5)
    assert distiller(*passes(0.3), masks).item() > 1e-4


def test_the_past_is_remembered_without_a_gradient() -> None:
    """A single sample is nothing yet; then there are the newest, as many as asked for."""
    memory = candidates.Remembering()
    memory.rows = 3
    masks = torch.ones(1, 32, 32) > 0
    loss = memory(*passes(0.3, batch=1), masks)
    assert loss == 0
    loss.backward()
    for seed in range(1, 5):
        teacher, student = passes(0.3, batch=1, seed=seed)
        memory(teacher, student, masks).backward()
        assert student.embedding.grad.abs().sum() > 0
    assert [len(x) for x in memory.past] == [3] * 4
    assert not any(x.requires_grad for x in memory.past)
    torch.testing.assert_close(memory.past[2][:1], teacher.embedding)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program adds to the names of distillers is taken back afterwards."""
    monkeypatch.setattr(sys, "argv", ["candidates.py", "finetune_sam.py", "--help"])
    monkeypatch.setattr(candidates.runpy, "run_path", lambda *given, **named: None)
    for names in (choice.KINDS, DISTILLERS):
        for name in candidates.CANDIDATES:
            monkeypatch.setitem(names, name, None)
    candidates.main()


def test_names_are_those_of_the_program(registered: None) -> None:
    for name, (kind, weight) in candidates.CANDIDATES.items():
        assert choice.KINDS[name] is kind
        assert DISTILLERS[name] == weight
    assert sys.argv == ["finetune_sam.py", "--help"]


def test_the_decoder_is_asked_beside_the_object(tmp_path: Path) -> None:
    """By a copy that shares the student's weights, of which its hooks see nothing."""
    teacher, student = build_once("sam"), build_once("sam")
    make_data(tmp_path / "general", train=3, val=1, test=1)
    for distiller in (
        candidates.Elsewhere(teacher, student),
        candidates.OnSource(teacher, student, tmp_path / "general"),
    ):
        assert not [*distiller.parameters()]
        size = student.frame.size
        masks = torch.zeros(2, size, size, dtype=torch.bool)
        masks[:, : size // 2] = True
        with Collector(student) as collector:
            images = torch.randn(2, 3, size, size)
            levels = student.encode(images)
            passed = Pass([], levels[-1], None, None)
            loss = distiller(passed, passed, masks)
            boxes = Prompts(torch.tensor([[2.0, 2.0, 20.0, 20.0]] * 2))
            collected = collector.pop(student.decode(levels, boxes))
            assert collected.embedding is levels[-1]
        weights = [*student.decoder.parameters()]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        assert any(grad is not None for grad in found)
