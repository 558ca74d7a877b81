"""Training with every method on every package, in half precision, with a cache, on processes."""

import csv
import importlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetuning_runs import (
    EPOCHS,
    FAMILIES,
    FAST_METHODS,
    FINETUNING,
    LEARNING_RATES,
    WEIGHTS,
    assert_same_run,
    assert_tensorboard_has_the_tables,
    combinations,
    make_data,
    outcome,
    rows,
    run,
    training_options,
    weights,
)
from safetensors.torch import load_file

import evaluate
from parts.data.batches import MaskedImages, collate
from parts.data.tables import Row, read_tables
from parts.errors import InputError
from parts.evaluation import scores
from parts.models import segmenter
from parts.models.adaptation import adapt
from parts.models.methods.adapters import PLACES
from parts.options import METHODS, parse_training
from parts.runs import trained as trained_students
from parts.runs.trained import load_run
from parts.training import loop
from parts.training.logbook import Logbook, keep_until

# What is saved of an encoder has these names.
SAVED = {
    "lora": ".lora_",
    "lora-heads": ".parts.",
    "su-sam-lora": ".parts.",
    "conv-lora": ".conv_lora.",
    **dict.fromkeys((*PLACES, "adaptformer"), ".adapter."),
    "bitfit": ".bias",
    "decoder": "nothing",
    "hq-sam": ".embedding_encoder.",  # of the decoder, by its name
}


@pytest.mark.parametrize(("family", "method"), combinations(METHODS))
def test_training(family: str, method: str, trained) -> None:
    output = trained(family, method)
    figures = rows(output)
    assert [row["step"] for row in figures] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in figures for value in row.values())
    # The same images in the first and the last epoch, but for their order.
    losses = [row["structure"] for row in figures]
    assert sum(losses[-2:]) < sum(losses[:2])
    for row in figures:
        infosam = row["compression"] + 0.5 * row["distillation"]
        assert row["infosam"] == pytest.approx(infosam, rel=1e-5)
        both = row["structure"] + row["infosam"] + row.get("load", 0.0)
        assert row["loss"] == pytest.approx(both, rel=1e-5)
    assert figures[-1]["learning_rate"] == pytest.approx(LEARNING_RATES[family] / 10)

    first, last = weights(output / "epoch-001"), weights(output / f"epoch-{EPOCHS:03}")
    assert first.keys() == last.keys()
    changed = [key for key in first if not torch.equal(first[key], last[key])]
    assert any(key.startswith("distiller.") for key in changed)
    assert any("mask_decoder." in key for key in changed)
    encoder = [key for key in first if "encoder." in key]
    assert all(SAVED[method] in key for key in encoder)
    assert any(key in changed for key in encoder) == (method != "decoder")

    result = json.loads((output / "result.json").read_text())
    assert set(result) == {"validation", "test"}
    assert 0 <= result["test"]["iou"] <= result["test"]["dice"] <= 1
    best = max(rows(output, "validation"), key=lambda row: row["iou"])
    assert result["validation"]["epoch"] == best["epoch"]
    assert result["validation"]["iou"] == pytest.approx(best["iou"])


def test_checkpoint_has_what_trains_and_nothing_else(trained) -> None:
    folder = trained("sam", "lora") / "epoch-001"
    assert {p.name for p in folder.iterdir()} == {
        "student.safetensors",
        "distiller.safetensors",
        "state.pt",
    }
    keys = load_file(folder / "student.safetensors").keys()
    assert all("lora_" in key or ".mask_decoder." in key for key in keys)
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() == {"epoch", "best", "optimizer", "schedule"}


def test_tensorboard_has_the_figures_of_the_table(trained) -> None:
    assert_tensorboard_has_the_tables(trained("sam", "lora"))


def listed_again(data: Path, folder: Path, splits: dict[str, list[int]]) -> Path:
    """Return a data set of rows of another, which may occur several times, each with its mask."""
    folder.mkdir()
    for split, chosen in splits.items():
        with (data / f"{split}.csv").open() as file:
            found = [*csv.DictReader(file)]
        lines = []
        for row, i in enumerate(chosen):
            mask = shutil.copy(data / found[i]["label"], folder / f"{split}{row}.png")
            lines.append(f"{i},{data / found[i]['image']},{mask}")
        (folder / f"{split}.csv").write_text("\n".join([",image,label", *lines]))
    return folder


def test_accumulation_and_precision(trained, data: Path, tmp_path: Path, capsys) -> None:
    eight = {"train": [0, 1, 2, 3] * 2, "val": [0], "test": [0]}
    folder = listed_again(data, tmp_path / "eight", eight)
    run("sam", folder, tmp_path / "run", "--epochs", 2, "--accumulate", 3, "--precision", "bf16")
    assert "the Gram matrices stay 2 x 2" in capsys.readouterr().out
    # Four batches an epoch are two steps of the optimiser, after three batches and after one.
    cosine = [2e-5 + 9e-5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    expected = [cosine[step] for step in (0, 0, 1, 2, 2, 2, 3, 4)]
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == pytest.approx(expected)

    # Half the precision moves the first loss, though not far.
    options = [*training_options("sam", "lora"), "--epochs", 1, "--precision", "bf16"]
    run("sam", data, tmp_path / "half", *options)
    half, single = (rows(output)[0] for output in (tmp_path / "half", trained("sam", "lora")))
    assert half["structure"] != single["structure"]
    assert half["structure"] == pytest.approx(single["structure"], rel=0.05)


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Logbook]:
    """Return a function that makes a logbook of two epochs of three batches."""
    logs = []

    def make(**others: bool) -> Logbook:
        asked = ["--model", "tiny", "--data", "data", "--output", str(tmp_path), "--track"]
        asked += ["--epochs", "2", "--log-every", "2", "--batch-size", "2"]
        options = parse_training("", asked, "sam")
        options.processes = 1
        rows = [Row(Path(f"{i}.jpg"), Path(f"{i}.png"), str(i)) for i in range(6)]
        logs.append(Logbook(options, rows, batches=3, **others))
        return logs[-1]

    yield make
    for each in logs:
        each.close()


def figures(value: float) -> dict[str, torch.Tensor]:
    terms = torch.tensor(value)
    return {"structure": terms**2, "infosam": terms, "loss": terms + terms**2}


def test_means_of_several_batches_share_a_row(log, tmp_path: Path, capsys) -> None:
    """Two batches to a row, and at the end of an epoch what is left."""
    book = log()
    for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        book.training([0, 1], figures(value), learning_rate=0.1)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 3, 5, 6]
    assert [row["structure"] for row in found] == [2.5, 9, 20.5, 36]
    assert [row["infosam"] for row in found] == [1.5, 3, 4.5, 6]
    assert [row["loss"] for row in found] == [4, 12, 25, 42]
    book.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    # The package of a tracker may print when it is first imported.
    bar = [line for line in captured.err.replace("\n", "\r").split("\r") if "epoch" in line]
    assert all(len(line) <= 80 for line in bar)
    assert any("epoch 2/2: 100%" in line and "6/6" in line for line in bar)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("silent", [False, True])
def test_the_first_loss_that_is_not_finite_is_named(value: float, silent: bool, log) -> None:
    book = log(silent=silent)
    for right in (1.0, 2.0, 3.0):
        book.training([0, 1], figures(right), learning_rate=0.1)
    book.training([4, 5], figures(value), learning_rate=0.1)
    with pytest.raises(InputError, match="structure loss of epoch 2, batch 1, is") as error:
        book.training([2, 3], figures(value), learning_rate=0.1)
    assert str(error.value).endswith("4.jpg, 5.jpg")


def test_a_scaler_may_skip_as_many_steps_as_it_can_halve(log) -> None:
    """It starts at 2 ** 16. A step that is not skipped starts the count again."""
    book = log(scaled=True)
    book.options.log_every = 1
    for value in [math.inf] * 16 + [1.0] + [math.inf] * 16:
        book.training([0, 1], figures(value), learning_rate=0.1)
    with pytest.raises(InputError, match="batch 1, is inf, and before it 16 others"):
        book.training([2, 3], figures(math.inf), learning_rate=0.1)


def test_rows_of_later_batches_are_removed_from_two_tables(tmp_path: Path) -> None:
    table = tmp_path / "training.csv"
    table.write_text("step,loss\n2,1.0\n3,2.0\n5,3.0\n6,4")  # the last row was cut short
    keep_until(table, 3)
    assert table.read_text() == "step,loss\n2,1.0\n3,2.0\n"
    keep_until(table, 1)
    assert not table.exists()
    keep_until(table, 1)


def test_infosam_acts_on_the_student(trained, data: Path, tmp_path: Path) -> None:
    run("sam", data, tmp_path / "run", *training_options("sam", "lora"), "--distiller", "none")
    runs = trained("sam", "lora"), tmp_path / "run"
    one, other = (weights(output / "epoch-001") for output in runs)
    student = [key for key in one if "lora_B" in key]
    assert student
    assert not any(torch.equal(one[key], other[key]) for key in student)
    structure = [rows(output)[0]["structure"] for output in runs]
    assert structure[0] == structure[1]  # the same first batch and prompts
    assert rows(tmp_path / "run")[0].keys() == {"step", "structure", "learning_rate"}


def test_checkpoints_at_some_epochs_alone(trained, data: Path, tmp_path: Path) -> None:
    options = [*training_options("sam", "lora"), "--validate-every", EPOCHS]
    run("sam", data, tmp_path / "run", *options)
    assert [path.name for path in tmp_path.glob("run/epoch-*")] == [f"epoch-{EPOCHS:03d}"]
    assert [row["epoch"] for row in rows(tmp_path / "run", "validation")] == [EPOCHS]
    last = f"epoch-{EPOCHS:03d}"
    expected, found = weights(trained("sam", "lora") / last), weights(tmp_path / "run" / last)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_the_last_epoch_is_always_kept(data: Path, tmp_path: Path) -> None:
    run("sam", data, tmp_path, "--distiller", "none", "--epochs", 3, "--validate-every", 2)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-002", "epoch-003"]


def test_the_start_holds_what_trains(data: Path, tmp_path: Path) -> None:
    """The squared distance starts at zero, is that of the weights, and keeps them near."""
    options = ["--distiller", "none", "--epochs", 1, "--method", "decoder", "--lr", 1e-3]
    for weight in (0.0, 1000.0):
        run("sam", data, tmp_path / str(weight), *options, "--start-weight", weight)
    held = rows(tmp_path / "1000.0")
    assert held[0]["start"] == 0
    assert held[1]["start"] > 0
    assert held[1]["loss"] == pytest.approx(held[1]["structure"] + held[1]["start"], rel=1e-5)
    start = {f"student.model.{k}": v for k, v in load_file(WEIGHTS).items()}
    distances = []
    for weight in (0.0, 1000.0):
        found = weights(tmp_path / str(weight) / "epoch-001")
        distances.append(sum((v - start[k]).square().sum().item() for k, v in found.items()))
    assert 0 < distances[1] < 0.9 * distances[0]


def test_a_shuffled_teacher_sees_another_image(data: Path, tmp_path: Path) -> None:
    """At the start the student is the teacher, so that their embeddings differ by the shuffle."""
    options = ["--distiller", "mobilesam", "--epochs", 1]
    run("sam", data, tmp_path / "right", *options)
    run("sam", data, tmp_path / "wrong", *options, "--shuffled-teacher")
    assert rows(tmp_path / "right")[0]["mobilesam"] < 1e-10
    assert rows(tmp_path / "wrong")[0]["mobilesam"] > 1e-3


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("sam", marks=pytest.mark.slow),
        pytest.param("sam2", marks=pytest.mark.slow),
        pytest.param("transformers-sam", marks=pytest.mark.slow),
        "transformers-sam2",
    ],
)
def test_with_a_teacher_cache(family: str, trained, data: Path, tmp_path: Path, capsys) -> None:
    """The run that fills the cache, one that finds it, and about the one without it."""
    options = [*training_options(family, FAST_METHODS[family]), "--epochs", 1]
    for name in ("fills", "finds"):
        run(family, data, tmp_path / name, *options, "--teacher-cache", tmp_path / "cache")
    assert "MB found in" in capsys.readouterr().out
    assert_same_run(tmp_path / "fills", tmp_path / "finds", "epoch-001")
    without = trained(family, FAST_METHODS[family])
    one, other = (rows(output)[0] for output in (tmp_path / "fills", without))
    assert one["structure"] == other["structure"]
    assert one["infosam"] == pytest.approx(other["infosam"], rel=0.02)


def test_a_larger_teacher(data: Path, tmp_path: Path, monkeypatch) -> None:
    built = []

    def build(package: str, name: str, checkpoint: Path | None):
        model = segmenter.build(package, "tiny", checkpoint if name == "tiny" else None)
        if name == "vit_l":
            model.model.image_encoder.blocks.append(model.model.image_encoder.blocks[0])
        built.append(model)
        return model

    monkeypatch.setattr(trained_students, "build", build)
    options = ["--teacher", "vit_l", "--teacher-checkpoint", WEIGHTS, "--epochs", 1]
    run("sam", data, tmp_path / "run", *options)
    _, teacher = built
    assert not any(p.requires_grad for p in teacher.parameters())
    assert rows(tmp_path / "run")[0]["relation_cosine"] < 0.99
    assert rows(tmp_path / "run")[0]["distilled_information"] != 0


def test_a_random_teacher_is_that_of_the_run(data: Path, tmp_path: Path, monkeypatch) -> None:
    """It is drawn after the student, by the same seed."""
    seen = []
    fit = loop.fit
    monkeypatch.setattr(loop, "fit", lambda *given: (seen.extend(given[3:5]), fit(*given)))
    options = ["--teacher", "tiny-sam", "--epochs", 1]
    run("transformers-sam", data, tmp_path / "run", *options)
    teacher, student = (model.state_dict() for model in seen)
    found = trained_students.load_teacher(tmp_path / "run").state_dict()
    assert all(torch.equal(found[name], value) for name, value in teacher.items())
    assert any(name in student and not torch.equal(found[name], student[name]) for name in found)


def test_collapse_is_reported(data: Path, tmp_path: Path, capsys) -> None:
    # The features of all samples are alike: they are one image, listed four times.
    folder = listed_again(data, tmp_path / "one", {"train": [0] * 4, "val": [0], "test": [0]})
    run("sam", folder, tmp_path / "run", "--epochs", 1, "--prompts", "boxes")
    assert capsys.readouterr().out.count("nearly the same for all images of a batch (0.0") == 1


def test_folders_instead_of_tables(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=8, val=1, test=1)
    for kind, ending in (("images", ".jpg"), ("masks", "_mask.png")):
        (tmp_path / kind).mkdir()
        for split in ("train", "val", "test"):
            for path in (data / split).glob(f"*{ending}"):
                name = f"{split}{path.name.removesuffix(ending)}{path.suffix}"
                (tmp_path / kind / name).write_bytes(path.read_bytes())
    script, *model = FAMILIES["sam"]
    folders = ["--images", tmp_path / "images", "--masks", tmp_path / "masks", "--workers", 0]
    options = [*folders, "--output", tmp_path / "run", "--epochs", 1, "--log-every", 1]
    main = importlib.import_module(script).main
    main([*model, *map(str, options)])
    assert len(rows(tmp_path / "run")) == 8 // 4

    # One more pair would move others from training to test.
    for folder in (tmp_path / "images", tmp_path / "masks"):
        copy = next(folder.iterdir())
        (folder / f"new{copy.suffix}").write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="not those of the run"):
        evaluate.main([str(tmp_path / "run")])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(SystemExit, match="not those of the run"):
        main([*model, *map(str, options), "--resume"])


@pytest.mark.slow
def test_four_processes_train_what_one_loads(tmp_path: Path, capsys) -> None:
    """One image a process: a Gram matrix over 4."""
    data = make_data(tmp_path / "data", train=8, val=2, test=2)
    script, *model = FAMILIES["sam"]
    options = ["--batch-size", 1, "--epochs", 2, "--teacher-cache", tmp_path / "cache", "--cpu"]
    common = ["--data", data, "--output", tmp_path / "run", "--workers", 0, "--log-every", 1]
    arguments = map(str, [*model, *common, *options, "--threads", 1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [sys.executable, *launch, str(FINETUNING / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for said in ("Teacher cache", "trainable parameters", "test, epoch"):
        assert done.stdout.count(said) == 1, done.stderr

    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["teacher_relation_entropy"] > 0.1 for row in found)  # 0 over a single image
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    student, _ = load_run(tmp_path / "run", result["validation"]["epoch"])
    images = MaskedImages(read_tables(data)["test"], student.frame)
    batches = [collate([images[i]]) for i in range(len(images))]
    found = scores.evaluate(student, batches, "boxes", 1)
    assert found == pytest.approx(result["test"], abs=1e-6)

    (tmp_path / "run" / "result.json").unlink()
    refused = outcome(data, tmp_path / "run", capsys, *options, "--batch-size", 2, "--resume")
    assert "--batch-size was 1, is 2; --processes was 4, is 1" in refused


@pytest.mark.parametrize(
    ("package", "name", "method", "count"),
    [
        ("sam", "vit_b", "lora", 147_456),
        ("sam", "vit_b", "adapter", 7_100_928),
        ("sam", "vit_b", "lora-heads", 12 * 3 * 12 * (768 * 4 + 4 * 64)),  # Eq. 31, 32
        ("sam", "vit_b", "adaptformer", 1_189_632),
        ("sam", "vit_b", "conv-lora", 12 * 13_536),
        ("sam", "vit_b", "su-sam-series", 7_100_928),
        ("sam", "vit_b", "su-sam-parallel", 7_100_928),
        ("sam", "vit_b", "su-sam-mixed", 7_100_928),
        ("sam", "vit_b", "su-sam-lora", 12 * 2 * (768 * 4 + 4 * 768)),
        ("sam2", "sam2.1_hiera_b+", "lora", 168_896),
        ("sam2", "sam2.1_hiera_b+", "adapter", 5_822_208),
        ("sam2", "sam2.1_hiera_b+", "adaptformer", 129 * 10_752 + 24 * 64),
        ("sam2", "sam2.1_hiera_b+", "conv-lora", 168_896 + 24 * 1_248),
    ],
)
def test_trainable_parameters_of_the_released_sizes(
    package: str, name: str, method: str, count: int
) -> None:
    # Weights without values are fast. Those of sam2 need some, as it moves them to a device.
    with torch.device("meta" if package == "sam" else "cpu"):
        student = importlib.import_module(f"parts.models.{package}").build(name, None)
        report = adapt(student, method, targets=["qkv"])
    assert sum(p.numel() for p in student.encoder.parameters() if p.requires_grad) == count
    assert f"{count:,}" in report
