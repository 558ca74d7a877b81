"""The fine-tuning scripts as a user runs them, on small models and a generated data set."""

import csv
import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning_runs import (
    EPOCHS,
    FAMILIES,
    FAST_METHODS,
    FINETUNING,
    LEARNING_RATES,
    assert_same_run,
    combinations,
    make_data,
    rows,
    run,
    training_options,
    weights,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import finetune_sam
from parts import checkpoint, evaluation
from parts.adaptation import METHODS, adapt
from parts.data import MaskedImages, collate, read_tables
from parts.logbook import Logbook
from parts.options import parse
from parts.trained import load_run
from renyi_kd import InfoSAMTerms

# What is saved of an encoder has these names.
SAVED = {
    "lora": ".lora_",
    "lora-heads": ".heads.",
    "adapter": ".adapter.",
    "bitfit": ".bias",
    "decoder": "nothing",
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
        assert row["loss"] == pytest.approx(row["structure"] + row["infosam"], rel=1e-5)
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


def assert_tensorboard_has_the_tables(output: Path) -> None:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    for name in ("training", "validation"):
        table = rows(output, name)
        for key in table[0].keys() - {"step"}:
            found = [(event.step, event.value) for event in events.Scalars(f"{name}/{key}")]
            assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in table]


def listed_again(data: Path, folder: Path, splits: dict[str, list[int]]) -> Path:
    """Return a data set of rows of another, which may occur several times."""
    folder.mkdir()
    for split, chosen in splits.items():
        with (data / f"{split}.csv").open() as file:
            found = [*csv.DictReader(file)]
        lines = [f"{i},{data / found[i]['image']},{data / found[i]['label']}" for i in chosen]
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


class Bar(list):
    """A progress bar that keeps the warnings."""

    said: str = ""

    def write(self, text: str) -> None:
        self.said += text

    def set_postfix(self, shown: dict[str, str]) -> None:
        pass


def test_means_of_several_batches_share_a_row(tmp_path: Path) -> None:
    """Two batches to a row, and at the end of an epoch what is left."""
    options = ["--data", "data", "--output", str(tmp_path), "--log-every", "2"]
    options = parse("", ["--model", "tiny", *options], "sam", ["tiny"])
    options.processes = 1
    log, bar = Logbook(options, step=0), Bar(range(3))
    for value in map(torch.tensor, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]):
        terms = InfoSAMTerms(*[value] * len(InfoSAMTerms._fields))
        log.training(bar, value**2, terms, learning_rate=0.1)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 3, 5, 6]
    assert [row["structure"] for row in found] == [2.5, 9, 20.5, 36]
    assert [row["infosam"] for row in found] == [1.5, 3, 4.5, 6]
    assert [row["loss"] for row in found] == [4, 12, 25, 42]
    assert bar.said == ""
    log.tensorboard.close()


def test_infosam_acts_on_the_student(trained, data: Path, tmp_path: Path) -> None:
    run("sam", data, tmp_path / "run", *training_options("sam", "lora"), "--no-infosam")
    runs = trained("sam", "lora"), tmp_path / "run"
    one, other = (weights(output / "epoch-001") for output in runs)
    student = [key for key in one if "lora_B" in key]
    assert student
    assert not any(torch.equal(one[key], other[key]) for key in student)
    structure = [rows(output)[0]["structure"] for output in runs]
    assert structure[0] == structure[1]  # the same first batch and prompts
    assert rows(tmp_path / "run")[0].keys() == {"step", "structure", "learning_rate"}


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

    def build(name, checkpoint):
        model = tiny(name if name == "tiny" else "tiny", checkpoint if name == "tiny" else None)
        if name == "vit_l":
            model.model.image_encoder.blocks.append(model.model.image_encoder.blocks[0])
        built.append(model)
        return model

    tiny = finetune_sam.build
    monkeypatch.setattr(finetune_sam, "build", build)
    options = ["--teacher", "vit_l", "--teacher-checkpoint", "unused", "--epochs", 1]
    run("sam", data, tmp_path / "run", *options)
    _, teacher = built
    assert not any(p.requires_grad for p in teacher.parameters())
    assert rows(tmp_path / "run")[0]["relation_cosine"] < 0.99
    assert rows(tmp_path / "run")[0]["distilled_information"] != 0


def test_collapse_is_reported(data: Path, tmp_path: Path, capsys) -> None:
    # The features of all samples are alike: they are one image, listed four times.
    folder = listed_again(data, tmp_path / "one", {"train": [0] * 4, "val": [0], "test": [0]})
    run("sam", folder, tmp_path / "run", "--epochs", 1, "--prompts", "boxes")
    assert capsys.readouterr().out.count("has collapsed to 0.0") == 1


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
    with pytest.raises(SystemExit, match="the same images for training"):
        main([*model, *map(str, options), "--resume"])


# --- stop and resume -----------------------------------------------------------------------------

# What strikes in the second epoch: a function, and what is done before it is called.
FAILURES = {
    "killed in a batch": "before(Logbook, 'training', lambda log, *_: log.step == 2 and kill())",
    "killed while writing weights": "before(checkpoint, 'save_file', half)",
    "killed while writing the state": "before(torch, 'save', half)",
    "killed before the rename": "before(Path, 'rename', lambda _, to: second(to) and kill())",
    "killed after the rename": "before(checkpoint, 'sync', lambda path: renamed(path) and kill())",
    "full disk": "before(Logbook, 'validation', lambda _, epoch, *__: epoch == 2 and limit())",
}
PREAMBLE = """
import os, resource, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {finetuning!r})
import torch
from parts import checkpoint
from parts.logbook import Logbook

def before(owner, name, strike):
    function = getattr(owner, name)
    def both(*args, **kwargs):
        strike(*args)
        return function(*args, **kwargs)
    setattr(owner, name, both)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def second(path):
    return "epoch-002" in str(path)

def renamed(path):
    return (path / "epoch-002").exists()

def half(content, path):
    if second(path):
        Path(path).write_bytes(b"half")
        kill()

def limit():  # as a full disk: writing goes so far and no further
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

"""


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(command(data, output), check=True, capture_output=True)
    return output


def command(data: Path, output: Path, *options: str, failure: str = "") -> list[str]:
    script, *model = FAMILIES["sam"]
    code = PREAMBLE.format(finetuning=str(FINETUNING)) + failure
    code += f"\nrunpy.run_path({str(FINETUNING / f'{script}.py')!r}, run_name='__main__')"
    common = ["--data", str(data), "--output", str(output), "--epochs", "3", "--threads", "1"]
    common += ["--log-every", "1", "--workers", "1", "--batch-size", "2", *options]
    return [sys.executable, "-c", code, *model, *common]


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_killed_and_resumed(failure: str, uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = subprocess.run(
        command(data, output, failure=FAILURES[failure]),
        check=False,
        capture_output=True,
        text=True,
    )
    if failure == "full disk":
        assert process.returncode == 1
        assert "File too large" in process.stderr
        assert not list(output.glob("*.unfinished"))
    else:
        assert process.returncode == -9, process.stderr
    survived = {"epoch-001"} | ({"epoch-002"} if failure == "killed after the rename" else set())
    assert {path.name for path in output.glob("epoch-???")} == survived
    for key, value in weights(uninterrupted / "epoch-001").items():
        assert torch.equal(value, weights(output / "epoch-001")[key])

    resumed = subprocess.run(
        command(data, output, "--resume"), check=False, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed after epoch {len(survived)}" in resumed.stdout
    assert_same_run(uninterrupted, output, "epoch-003")
    assert_tensorboard_has_the_tables(output)
    assert not list(output.glob("*.unfinished"))


def stop_and_resume(family: str, data: Path, output: Path, options: list[object]) -> None:
    """Train, but stop after the first epoch and go on from its checkpoint."""
    save = checkpoint.save

    def save_and_stop(*args) -> None:
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(family, data, output, *options)
    torch.manual_seed(99)  # nothing of this process is to be needed
    run(family, data, output, *options, "--resume")


def test_resumed_run_is_the_uninterrupted_one(trained, data: Path, tmp_path: Path) -> None:
    family = "transformers-sam"  # of random weights, which have to be those of the first time
    options = training_options(family, FAST_METHODS[family])
    stop_and_resume(family, data, tmp_path / "run", options)
    assert_same_run(trained(family, FAST_METHODS[family]), tmp_path / "run", "epoch-002")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_with_rows_of_several_batches(family: str, data: Path, tmp_path: Path) -> None:
    options = ["--epochs", 2, "--log-every", 3]  # a row is not to reach over the epochs' border
    run(family, data, tmp_path / "whole", *options)
    stop_and_resume(family, data, tmp_path / "parts", options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "epoch-002")


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
    scores = evaluation.evaluate(student, batches, "boxes", 1)
    assert scores == pytest.approx(result["test"], abs=1e-6)

    (tmp_path / "run" / "result.json").unlink()
    refused = outcome(data, tmp_path / "run", capsys, *options, "--batch-size", 2, "--resume")
    assert "--batch-size was 1, is 2; --processes was 4, is 1" in refused


@pytest.mark.parametrize(
    ("package", "name", "method", "count"),
    [
        ("sam", "vit_b", "lora", 147_456),
        ("sam", "vit_b", "adapter", 7_100_928),
        ("sam", "vit_b", "lora-heads", 12 * 3 * 12 * (768 * 4 + 4 * 64)),  # Eq. 31, 32
        ("sam2", "sam2.1_hiera_b+", "lora", 168_896),
        ("sam2", "sam2.1_hiera_b+", "adapter", 5_822_208),
    ],
)
def test_trainable_parameters_of_the_released_sizes(
    package: str, name: str, method: str, count: int
) -> None:
    # Weights without values are fast. Those of sam2 need some, as it moves them to a device.
    with torch.device("meta" if package == "sam" else "cpu"):
        student = importlib.import_module(f"parts.{package}").build(name, None)
        report = adapt(student, method, targets=["qkv"])
    assert sum(p.numel() for p in student.encoder.parameters() if p.requires_grad) == count
    assert f"{count:,}" in report


def test_documented_commands_parse() -> None:
    text = (FINETUNING / "README.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith(".venv/bin/")]
    parsed = 0
    for line in commands:
        words = shlex.split(line, comments=True)
        files = [word for word in words if word.startswith("examples/")]
        assert files
        assert all((FINETUNING.parents[1] / file).is_file() for file in files), line
        script, *arguments = words[words.index(files[0]) :]
        if Path(script).name.startswith("finetune_"):
            models = getattr(importlib.import_module(Path(script).stem), "MODELS", ())
            parse("", arguments, "", models)
            parsed += 1
    assert parsed >= 14


# --- held wrong ----------------------------------------------------------------------------------


def outcome(data: Path, output: Path, capsys, *options: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run("sam", data, output, *options)
    return f"{exit_info.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 1], "--batch-size must be at least 2"),
        (["--batch-size", 16], "--batch-size must be at most the number of training images, 4"),
        (["--images", "somewhere", "--masks", "elsewhere"], "either --data or both"),
        (["--images", "somewhere"], "either --data or both"),
        (["--epochs", 0], "must be at least 1, got 0"),
        (["--model", "vit_l", "--teacher", "vit_h"], "--teacher-checkpoint is needed for vit_h"),
        (["--targets", "query"], "linear layers are called lin1, lin2, proj, qkv"),
        (["--precision", "fp16", "--cpu"], "fp16"),
        (["--alpha", -1], "alpha"),
        (["--checkpoint", "nowhere.pth"], "--checkpoint must be a readable file"),
        (["--model", "vit_b"], "--checkpoint must be of vit_b"),
        (["--test-table", "test_other.csv"], "test_other.csv"),
    ],
)
def test_wrong_options(
    options: list[object], message: str, data: Path, tmp_path: Path, capsys
) -> None:
    assert message in outcome(data, tmp_path / "run", capsys, *options)
    assert not (tmp_path / "run").exists()  # so that the next attempt may use the name


def test_wrong_outputs(trained, data: Path, tmp_path: Path, capsys) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    assert "must be a new or empty folder" in outcome(data, full, capsys)

    finished, options = trained("sam", "lora"), training_options("sam", "lora")
    assert "holds a finished run" in outcome(data, finished, capsys, *options, "--resume")
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    (stopped / "result.json").unlink()
    assert "Go on with --resume" in outcome(data, stopped, capsys, *options)
    changed = outcome(data, stopped, capsys, *options, "--epochs", 3, "--lr", 1, "--resume")
    assert "--epochs was 2, is 3; --lr was 0.001, is 1.0" in changed
