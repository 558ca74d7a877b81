"""What distillers are given, what they train, and what is refused before training."""

import importlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from finetuning_runs import (
    FAMILIES,
    FINETUNING,
    assert_same_run,
    build,
    build_once,
    make_data,
    rows,
    run,
    stop_and_resume,
    training_options,
    weights,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parts.data.prompts import Prompts
from parts.distillers.base import LAYERS, Pass
from parts.distillers.choice import KINDS, build_distiller, compared_layers, relation_module
from parts.distillers.collecting import Collector
from parts.distillers.infosam import UnregularizedInfoSAM
from parts.distillers.relations import RELATIONS, StackedRelation, relation_of
from parts.errors import InputError
from parts.models.adaptation import adapt
from parts.models.segmenter import Segmenter
from parts.options import DISTILLERS, WITH_LAYERS, parse_training
from parts.options import RELATIONS as RELATION_NAMES
from parts.runs.recorded import LATER
from renyi_kd import RelationModule

BATCH = 4
HEAVY = {"semckd", "reviewkd"}  # of many weights, on the smallest model
FAST = {"sam": {*KINDS} - HEAVY, "sam2": set(), "transformers-sam": HEAVY}
FAST["transformers-sam2"] = {"vid"}
# These compare the images of a batch, or say how unlikely the teacher is, so they are not zero.
NOT_ZERO = ("infosam", "ibd", "vid", "semckd", "reviewkd")


def options_of(name: str, **others: object) -> Namespace:
    """Return what `build_distiller` reads of the options."""
    given = {"distiller": name, "batch_size": BATCH, "processes": 1, "layers": None}
    given |= {"teacher_layers": None, "teacher_cache": None, "relation": "attention-1"}
    given |= {"relation_from": None, "freeze_relation": False, "without_regularization": False}
    given |= {
        "digests": {},
        "method": "lora",
        "alpha": 2.0,
        "compression_weight": 1.0,
        "distillation_weight": 0.5,
    }
    return Namespace(**(given | others))


def make_batch() -> tuple[Tensor, Prompts, Tensor]:
    """Return four pictures, a box for each, and the objects in them."""
    torch.manual_seed(1)
    corners = torch.tensor([[30.0, 40.0], [90.0, 20.0], [10.0, 120.0], [60.0, 60.0]])
    boxes = torch.cat([corners, corners + torch.tensor([120.0, 100.0])], 1)
    masks = torch.zeros(BATCH, 256, 256, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    # Models with random weights hardly tell pictures apart but by their colours.
    colours = 3 * torch.randn(BATCH, 3, 1, 1)
    images = torch.randn(BATCH, 3, 256, 256) + colours + 2 * masks[:, None]
    return images, Prompts(boxes), masks


def passed(model: Segmenter, layers: Iterable[int], images: Tensor, prompts: Prompts) -> Pass:
    """Return what a pass of a model leaves."""
    with Collector(model, list(layers)) as collector:
        return collector.pop(model(images, prompts))


def cases() -> list[object]:
    """Return each family with each distiller, as slow tests but for those of `FAST`."""
    return [
        pytest.param(family, name, marks=() if name in FAST[family] else pytest.mark.slow)
        for family in FAMILIES
        for name in KINDS
    ]


@pytest.mark.parametrize(("family", "name"), cases())
def test_its_loss_alone_falls_by_a_tenth_in_ten_steps(family: str, name: str) -> None:
    images, prompts, masks = make_batch()
    teacher, student = build_once(family), build(family)
    adapt(student, "lora", targets=["qkv"])
    with torch.no_grad():  # so that the student is not the teacher
        for parameter in (p for p in student.parameters() if p.requires_grad):
            scale = parameter.std() if parameter.numel() > 1 and parameter.any() else 0.1
            parameter.add_(0.5 * scale * torch.randn_like(parameter))
    options = options_of(name)
    distiller = build_distiller(options, teacher, student)
    of_teacher, of_student = compared_layers(options, teacher, student)
    with torch.no_grad():
        target = passed(teacher, of_teacher, images, prompts)
    # What a distiller learns begins at random. The variances of VID begin far from where they end.
    learned = [p for p in distiller.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in student.parameters() if p.requires_grad], "lr": 3e-4},
        {"params": [p for p in learned if p.ndim > 1], "lr": 1e-2},
        {"params": [p for p in learned if p.ndim == 1], "lr": 0.2 if name == "vid" else 1e-2},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    losses = []
    for _ in range(11):
        loss = distiller(target, passed(student, of_student, images, prompts), masks)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] - min(losses[1:]) > 0.1 * abs(losses[0]), losses


@pytest.mark.parametrize("name", KINDS)
def test_equal_passes(name: str) -> None:
    """Most losses are zero there, and at their least."""
    images, prompts, masks = make_batch()
    model = build_once("sam")
    options = options_of(name)
    distiller = build_distiller(options, model, model)
    of_teacher, _ = compared_layers(options, model, model)
    with torch.no_grad():
        target = passed(model, of_teacher, images, prompts)
    inputs = [*target.layers, target.embedding, target.tokens, target.logits]
    copies = [x.clone().requires_grad_() for x in inputs]
    student = Pass(copies[:-3], *copies[-3:])
    loss = distiller(target, student, masks)
    gradients = torch.autograd.grad(loss, copies, allow_unused=True)
    # What a distiller does not need, it does not look at.
    used = [g is not None for g in gradients]
    assert used[:-3] == [LAYERS in distiller.needs] * (len(copies) - 3)
    names = ("embedding", "tokens", "logits")
    assert {n for n, is_used in zip(names, used[-3:], strict=True) if is_used} == {*names} & {
        *distiller.needs
    }
    if name not in NOT_ZERO:
        assert abs(loss.item()) < 1e-5
        # Of absolute distances the gradient is a sign, and zero at zero.
        assert all(g.abs().max() < 1e-6 for g in gradients if g is not None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_collected(family: str) -> None:
    images, prompts, _ = make_batch()
    model = build_once(family)
    outputs: dict[int, Tensor] = {}
    handles = [
        model.blocks[i].register_forward_hook(
            lambda block, inputs, output, i=i: outputs.__setitem__(i, output)
        )
        for i in model.stages
    ]
    found = passed(model, model.stages, images, prompts)
    for handle in handles:
        handle.remove()
    assert len(found.layers) == len(model.stages) > 0
    for i, layer in zip(model.stages, found.layers, strict=True):
        assert torch.equal(layer.permute(0, 2, 3, 1), outputs[i])
        assert layer.shape[:2] == (BATCH, model.channels(i))
    if "sam2" in family:  # stages halve the size and double the channels
        assert [layer.shape[2] for layer in found.layers] == [64, 32, 16, 8]
    else:
        assert {layer.shape[2] for layer in found.layers} == {16}
    assert torch.equal(found.embedding, model.encode(images)[-1])
    assert found.tokens.shape == (BATCH, 1, model.dim)
    assert found.logits.shape == (BATCH, 64, 64)


@torch.no_grad()
def test_half_precision_is_widened_and_nothing_is_left() -> None:
    images, prompts, _ = make_batch()
    model = build("sam")
    layers = model.stages
    with Collector(model, layers) as collector, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            found = collector.pop(model(images, prompts))
            assert {x.dtype for x in (*found.layers, found.embedding)} == {torch.float32}
            assert len(found.layers) == len(layers)
    model(images, prompts)
    assert collector.layers == []
    assert not any(block._forward_hooks for block in model.blocks)


# --- relations -----------------------------------------------------------------------------------


def test_names_of_the_command_line_are_those_that_exist() -> None:
    assert {*DISTILLERS} == {*KINDS, "none"}
    assert {*WITH_LAYERS} == {name for name, kind in KINDS.items() if LAYERS in kind.needs}
    assert (*RELATIONS,) == RELATION_NAMES


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("attention-1", 132_608),
        ("attention-3", 132_608 + 512 + 2 * (512 + 4 * (256 * 256 + 256))),
        ("attention-5", 132_608 + 512 + 4 * (512 + 4 * (256 * 256 + 256))),
        ("linear", 256 * 256 + 256),
        ("dot-product", 0),
    ],
)
def test_relations(name: str, count: int) -> None:
    relation = RELATIONS[name](256)
    assert sum(p.numel() for p in relation.parameters()) == count
    embedding, tokens = torch.randn(3, 256, 4, 5), torch.randn(3, 2, 256)
    found = relation_of(relation, embedding, tokens)
    assert found.shape == (3, 2 * 4 * 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_stacked_relation_follows_its_formula() -> None:
    torch.manual_seed(0)
    relation = StackedRelation(8, layers=3).double()
    pixels, tokens = torch.randn(2, 6, 8).double(), torch.randn(2, 3, 8).double()
    normed, expected = relation.pixel_norm(pixels), tokens
    for norm, layer in zip(relation.token_norms, relation.attentions, strict=True):
        q, k, v = layer.in_proj_weight.chunk(3)
        bq, bk, bv = layer.in_proj_bias.chunk(3)
        scores = (norm(expected) @ q.T + bq) @ (normed @ k.T + bk).mT / 8**0.5
        expected = expected + layer.out_proj(scores.softmax(-1) @ (normed @ v.T + bv))
    expected = relation.last(pixels, expected)
    torch.testing.assert_close(relation(pixels, tokens), expected)


def test_linear_relation_follows_its_formula() -> None:
    relation = RELATIONS["linear"](8).double()
    pixels, tokens = torch.randn(2, 6, 8).double(), torch.randn(2, 3, 8).double()
    expected = relation.linear(tokens) @ pixels.mT
    expected = expected / expected.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(relation(pixels, tokens), expected)


def test_without_regularization_the_joint_entropy_is_left() -> None:
    torch.manual_seed(0)
    relation = RelationModule(8).double()
    teacher, student = (
        Pass(embedding=torch.randn(4, 8, 3, 3).double(), tokens=torch.randn(4, 1, 8).double())
        for _ in range(2)
    )
    grams = []
    for each in (teacher, student):
        r = relation(each.embedding, each.tokens).flatten(1)
        r = r / r.norm(dim=1, keepdim=True)
        grams.append(r @ r.T / 4)
    joint = grams[0] * grams[1]
    expected = -0.5 * torch.log2((joint / joint.trace()).square().sum())
    found = UnregularizedInfoSAM(relation, 2.0, 0.5)(teacher, student, torch.zeros(1))
    torch.testing.assert_close(found, expected)


# --- runs ----------------------------------------------------------------------------------------

# Options that an older version had already, though not the first one.
OLD = ("checkpoint", "digests", "foreground", "ignore", "image_range", "teacher")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set with two batches of four."""
    return make_data(tmp_path_factory.mktemp("eight"), train=8, val=2, test=2)


def test_a_distiller_that_learns_resumes_to_the_bit(eight: Path, tmp_path: Path) -> None:
    options = ["--distiller", "semckd", "--batch-size", 4, "--epochs", 2, "--method", "bitfit"]
    run("transformers-sam", eight, tmp_path / "whole", *options)
    stop_and_resume("transformers-sam", eight, tmp_path / "parts", options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "epoch-002")
    first, last = (weights(tmp_path / "parts" / f"epoch-00{i}") for i in (1, 2))
    learned = [key for key in first if key.startswith("distiller.regressors")]
    assert learned
    assert not any(torch.equal(first[key], last[key]) for key in learned)


def test_the_weight_counts(data: Path, tmp_path: Path) -> None:
    options = [*training_options("sam", "lora"), "--epochs", 1, "--distiller", "mobilesam"]
    run("sam", data, tmp_path / "one", *options, "--teacher-cache", tmp_path / "cache")
    run("sam", data, tmp_path / "ten", *options, "--distiller-weight", 10)
    one, ten = (rows(tmp_path / name)[-1] for name in ("one", "ten"))
    assert one["loss"] == pytest.approx(one["structure"] + one["mobilesam"])
    assert ten["loss"] == pytest.approx(ten["structure"] + 10 * ten["mobilesam"])
    assert ten["mobilesam"] != one["mobilesam"]


def test_relation_of_another_run(trained, data: Path, tmp_path: Path) -> None:
    origin = trained("sam", "lora")
    options = [*training_options("sam", "lora"), "--relation-from", origin]
    run("sam", data, tmp_path / "frozen", *options, "--freeze-relation")
    run("sam", data, tmp_path / "free", *options)
    before = relation_module(options_of("infosam", relation_from=origin), 64).state_dict()
    saved = weights(tmp_path / "free" / "epoch-001")
    assert all(not torch.equal(saved[f"distiller.relation.{k}"], v) for k, v in before.items())
    assert not any(k.startswith("distiller") for k in weights(tmp_path / "frozen" / "epoch-001"))
    # The first batch is the same, and so is the relation there.
    first = [rows(tmp_path / name)[0]["teacher_relation_entropy"] for name in ("frozen", "free")]
    assert first[0] == first[1]
    assert first[0] != rows(origin)[0]["teacher_relation_entropy"]


def test_a_resumed_run_needs_the_same_relation(trained, data: Path, tmp_path: Path) -> None:
    """A frozen one is in no checkpoint of the run."""
    origin = shutil.copytree(trained("sam", "lora"), tmp_path / "origin")
    options = [*training_options("sam", "lora"), "--freeze-relation", "--relation-from"]
    run("sam", data, tmp_path / "run", *options, origin)
    for folder in (tmp_path / "origin").glob("epoch-*"):
        state = load_file(folder / "distiller.safetensors")
        save_file({k: v + 1 for k, v in state.items()}, folder / "distiller.safetensors")
    for given in ([*options, origin], [*training_options("sam", "lora"), "--freeze-relation"]):
        with pytest.raises(SystemExit, match="--relation-from must be the run that this one took"):
            run("sam", data, tmp_path / "run", *given, "--epochs", 3, "--resume")


@pytest.mark.slow
def test_pictures_do_not_need_the_origin_of_a_relation_that_learned(
    trained, data: Path, tmp_path: Path
) -> None:
    origin = shutil.copytree(trained("sam", "lora"), tmp_path / "origin")
    options = [*training_options("sam", "lora"), "--epochs", 1, "--relation-from", origin]
    run("sam", data, tmp_path / "run", *options)
    shutil.rmtree(origin)
    importlib.import_module("pictures").main(
        [str(tmp_path / "run"), "--output", str(tmp_path / "pictures")]
    )
    assert (tmp_path / "pictures" / "relations.png").exists()


@pytest.mark.parametrize("name", ["vid", "ibd"])
def test_distillers_compute_in_float32(name: str, eight: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    kind = KINDS[name]
    forward = kind.forward

    def watched(self: nn.Module, *passes: object) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *passes)

    monkeypatch.setattr(kind, "forward", watched)
    options = ["--distiller", name, "--precision", "bf16", "--epochs", 1, "--cpu"]
    run("transformers-sam", eight, tmp_path / "run", *options)
    assert seen
    assert not any(seen)


def test_runs_of_an_older_version_go_on(trained, data: Path, tmp_path: Path) -> None:
    """It had `--no-infosam`, and other names for the factors of `lora-heads`."""
    for name, method, given in (
        ("plain", "lora", ["--distiller", "none"]),
        ("heads", "lora-heads", []),
    ):
        output = tmp_path / name
        options = [*training_options("sam", method), *given]
        run("sam", data, output, *options, "--epochs", 1)
        recorded = json.loads((output / "options.json").read_text())
        old = {key: value for key, value in recorded.items() if key not in LATER or key in OLD}
        (output / "options.json").write_text(json.dumps(old | {"no_infosam": name == "plain"}))
        path = output / "epoch-001" / "student.safetensors"
        state = {k.replace(".parts.", ".heads."): v for k, v in load_file(path).items()}
        save_file(state, path)
        columns = (output / "training.csv").read_text().splitlines()[0]
        run("sam", data, output, *options, "--epochs", 2, "--resume")
        assert (output / "training.csv").read_text().splitlines()[0] == columns
    # As the older version wrote it.
    assert columns.startswith("step,structure,infosam,loss,compression,distillation,")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinysam-relation", "mobilesam-relation", "infosam"])
@pytest.mark.parametrize("relation", RELATION_NAMES)
def test_distillers_with_every_relation(
    name: str, relation: str, data: Path, tmp_path: Path
) -> None:
    options = [*training_options("sam", "lora"), "--epochs", 1]
    run("sam", data, tmp_path / "run", *options, "--distiller", name, "--relation", relation)
    learned = [k for k in weights(tmp_path / "run" / "epoch-001") if k.startswith("distiller")]
    assert bool(learned) == (relation != "dot-product")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vid", "ibd", "semckd", "reviewkd", "pkd"])
def test_two_processes_agree(name: str, eight: Path, tmp_path: Path) -> None:
    """Weights of the distiller are averaged, so that both train the same ones."""
    script, *model = FAMILIES["sam"]
    options = ["--distiller", name, "--batch-size", 4, "--epochs", 1, "--cpu", "--threads", 1]
    common = ["--data", eight, "--output", tmp_path / "run", "--workers", 0, "--log-every", 1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = tmp_path / "both.py"
    program.write_text(BOTH.format(finetuning=str(FINETUNING), script=script))
    command = [sys.executable, *launch, str(program), *map(str, [*model, *common, *options])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same on both") == 1, done.stdout


BOTH = """
import sys, importlib
sys.path.insert(0, {finetuning!r})
import torch
from parts.training import loop
fit = loop.fit
def fit_and_compare(*given):
    fit(*given)
    for module in given[4:6]:
        for name, value in module.named_parameters():
            other = value.detach().clone()
            torch.distributed.broadcast(other, 0)
            assert torch.equal(other, value), name
    print("same on both")
loop.fit = fit_and_compare
importlib.import_module({script!r}).main(sys.argv[1:])
"""


# --- refused before training ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("semckd", {"batch_size": 3}, "semckd needs a --batch-size of at least 4, got 3"),
        ("semckd", {"batch_size": 2, "processes": 2}, "at least 4, got 2"),
        ("ibd", {"batch_size": 1}, "ibd needs a --batch-size of at least 2, got 1"),
        ("pkt", {"batch_size": 1}, "pkt needs a --batch-size of at least 2, got 1"),
        ("vid", {"layers": [1, 5]}, "--layers must be .* from 0 to 4, got 1 5"),
        ("vid", {"layers": [4, 1]}, "--layers must be .* that rise, .* got 4 1"),
        ("ibd", {"teacher_layers": [1, 1]}, "--teacher-layers must be .*, got 1 1"),
        ("pkd", {"layers": [9]}, "--layers must be .*, got 9"),
        ("vid", {"layers": [4]}, "1 of the student and 2 of the teacher; choose as many"),
        ("reviewkd", {"teacher_layers": [0, 1, 4]}, "2 of the student and 3 of the teacher"),
        ("vid", {"teacher_cache": Path("c")}, "--teacher-cache holds image embeddings alone"),
        ("infosam", {"without_regularization": True, "processes": 2}, "needs a single process"),
        ("infosam", {"relation_from": Path("nowhere")}, "nowhere must hold a run"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, object], message: str) -> None:
    model = build_once("sam")
    with pytest.raises(InputError, match=message):
        build_distiller(options_of(name, **options), model, model)


def test_masks_of_sam2_need_more_than_the_cache() -> None:
    given = {"teacher_cache": Path("cache")}
    for family in ("sam2", "transformers-sam2"):
        with pytest.raises(InputError, match="--teacher-cache holds image embeddings alone"):
            build_distiller(options_of("logit", **given), build_once(family), build_once(family))
    assert isinstance(
        build_distiller(options_of("logit", **given), *[build_once("sam")] * 2), nn.Module
    )


@pytest.mark.parametrize("method", ["decoder", "hq-sam"])
def test_a_distiller_that_could_train_nothing_is_refused(method: str) -> None:
    student = build("sam")
    adapt(student, method, targets=["qkv"])
    teacher = build_once("sam")
    for name in ("pkd", "pkt", "vid", "semckd", "reviewkd", "mobilesam"):
        with pytest.raises(InputError, match=f"{name} compares .* --method {method} does not"):
            build_distiller(options_of(name, method=method), teacher, student)
    for name in ("infosam", "logit", "ibd", "tinysam", "mobilesam-relation"):
        build_distiller(options_of(name, method=method), teacher, student)


@pytest.mark.parametrize("relation", ["attention-3", "linear"])
def test_relation_of_another_kind_is_refused(relation: str, trained) -> None:
    given = {"relation": relation, "relation_from": trained("sam", "lora")}
    with pytest.raises(InputError, match=f"--relation {relation} of this width, .* are others"):
        relation_module(options_of("infosam", **given), 64)


def test_relation_of_another_width_is_refused(trained) -> None:
    given = {"relation_from": trained("sam", "lora")}
    with pytest.raises(InputError, match=r"is \(64,\), must be \(32,\)"):
        relation_module(options_of("infosam", **given), 32)


def test_damaged_relation_is_refused(trained, tmp_path: Path) -> None:
    run_folder = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    for path in run_folder.glob("epoch-*/distiller.safetensors"):
        path.write_bytes(b"\0\0")
    with pytest.raises(InputError, match=r"distiller.safetensors is damaged"):
        relation_module(options_of("infosam", relation_from=run_folder), 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--distiller none --distiller-weight 1", "--distiller-weight needs a --distiller"),
        ("--distiller pkd --relation linear", "--relation needs --distiller infosam or tinysam-re"),
        ("--distiller pkd --relation-from runs", "--relation-from needs --distiller infosam or"),
        ("--distiller none --freeze-relation", "--freeze-relation needs --distiller infosam or"),
        ("--distiller pkd --layers 1", "--layers needs --distiller ibd or vid or semckd or review"),
        (
            "--teacher-layers 1",
            "--teacher-layers needs --distiller ibd or vid or semckd",
        ),
        ("--distiller logit --alpha 3", "--alpha needs --distiller infosam, got logit"),
        ("--distiller none --compression-weight 0", "--compression-weight needs --distiller info"),
        ("--without-regularization --compression-weight 2", "has no effect with --without-regu"),
        ("--method lora --hq-checkpoint x.pth", "--hq-checkpoint needs --method hq-sam, got lora"),
        ("--legacy-loss --point-loss", "not allowed with argument"),
        ("--relation dot-product --freeze-relation", "has no weights to start from or to freeze"),
        ("--distiller pkd --without-regularization", "needs --distiller infosam, got pkd"),
        ("--distiller-weight -1", "must be at least 0"),
        ("--distiller crd", "invalid choice: 'crd'"),
        ("--layers", "expected at least one argument"),
    ],
)
def test_options_without_effect_are_refused(options: str, message: str, capsys) -> None:
    given = ["--model", "tiny", "--data", "d", "--output", "o", *options.split()]
    with pytest.raises(SystemExit):
        parse_training("", given, "sam")
    assert message in capsys.readouterr().err
