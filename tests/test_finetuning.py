"""The fine-tuning scripts as a user runs them, on small models and a generated data set."""

import csv
import importlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"
SAM = ["finetune_sam", "--model", "tiny", "--checkpoint", str(EXAMPLES / "tiny_sam.safetensors")]
FAMILIES = {
    "sam": SAM,
    "sam2": ["finetune_sam2", "--model", "tiny"],
    "transformers-sam": ["finetune_transformers", "--model", "tiny-sam"],
    "transformers-sam2": ["finetune_transformers", "--model", "tiny-sam2"],
}


@pytest.fixture(autouse=True)
def examples(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sizes = ["--train", "8", "--val", "2", "--test", "2"]
    command = [sys.executable, str(EXAMPLES / "make_dataset.py"), str(folder), *sizes]
    subprocess.run(command, check=True)
    return folder


def run(family: list[str], data: Path, output: Path, *options: object) -> None:
    script, *model = family
    common = ["--data", data, "--output", output, "--workers", 0, "--log-every", 1]
    importlib.import_module(script).main([*model, *map(str, common), *map(str, options)])


def rows(output: Path, name: str = "training") -> list[dict[str, float]]:
    with (output / f"{name}.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("student", "distiller")
        for key, value in load_file(checkpoint / f"{name}.safetensors").items()
    }


def assert_same_run(one: Path, other: Path, epoch: str) -> None:
    """The same weights bit for bit, figures and result."""
    expected, found = weights(one / epoch), weights(other / epoch)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert rows(one) == rows(other)
    assert (one / "result.json").read_text() == (other / "result.json").read_text()


@pytest.mark.parametrize("method", ["lora", "adapter", "decoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps(family: str, method: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # The same batches and prompts in the first and the last epoch, but for their order.
    options = ["--method", method, "--epochs", 5, "--lr", 1e-3, "--prompts", "boxes"]
    run(FAMILIES[family], data, output, *options)
    figures = rows(output)
    assert [row["step"] for row in figures] == list(range(1, 11))
    assert all(math.isfinite(value) for row in figures for value in row.values())
    losses = [row["structure"] for row in figures]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert figures[0]["infosam"] == pytest.approx(
        figures[0]["compression"] + 0.5 * figures[0]["distillation"], rel=1e-5
    )
    assert figures[-1]["learning_rate"] == pytest.approx(1e-4)

    first, last = weights(output / "epoch-001"), weights(output / "epoch-005")
    parts = {"lora": "lora_B", "adapter": "adapter.up", "decoder": "mask_decoder"}
    changed = [key for key in first if not torch.equal(first[key], last[key])]
    assert any(parts[method] in key for key in changed)
    assert any(key.startswith("distiller.") for key in changed)
    encoder = [key for key in first if "encoder" in key and "lora" not in key]
    assert all("adapter" in key for key in encoder)

    result = json.loads((output / "result.json").read_text())
    assert set(result) == {"validation", "test"}
    assert 0 <= result["test"]["iou"] <= result["test"]["dice"] <= 1
    best = max(rows(output, "validation"), key=lambda row: row["iou"])
    assert result["validation"]["epoch"] == best["epoch"]
    assert result["validation"]["iou"] == pytest.approx(best["iou"])


def test_tensorboard_has_the_figures_of_the_table(data: Path, tmp_path: Path) -> None:
    run(SAM, data, tmp_path / "run", "--epochs", 2)
    assert_tensorboard_has_the_tables(tmp_path / "run")


def assert_tensorboard_has_the_tables(output: Path) -> None:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    for name in ("training", "validation"):
        table = rows(output, name)
        for key in table[0].keys() - {"step"}:
            found = [(event.step, event.value) for event in events.Scalars(f"{name}/{key}")]
            assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in table]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_and_precision(precision: str, data: Path, tmp_path: Path, capsys) -> None:
    options = ["--epochs", 3, "--batch-size", 2, "--accumulate", 3, "--precision", precision]
    run(SAM, data, tmp_path / "run", *options)
    assert "the Gram matrices stay 2 x 2" in capsys.readouterr().out
    figures = rows(tmp_path / "run")
    assert len(figures) == 12
    # Four batches an epoch are two steps of the optimiser, and the last one has come to a tenth.
    rates = [row["learning_rate"] for row in figures]
    assert len(set(rates)) == 7
    assert rates[-1] == pytest.approx(2e-5)


def test_means_of_several_batches_share_a_row(data: Path, tmp_path: Path) -> None:
    run(SAM, data, tmp_path / "one", "--epochs", 2)
    run(SAM, data, tmp_path / "two", "--epochs", 2, "--log-every", 2)
    run(SAM, data, tmp_path / "many", "--epochs", 2, "--log-every", 100)
    assert rows(tmp_path / "many") == rows(tmp_path / "two")  # at the end of an epoch at the latest
    single, pairs = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in pairs] == [2, 4]
    for row, a, b in zip(pairs, single[::2], single[1::2], strict=True):
        assert row["structure"] == pytest.approx((a["structure"] + b["structure"]) / 2, rel=1e-6)


def test_without_infosam(data: Path, tmp_path: Path) -> None:
    run(SAM, data, tmp_path / "run", "--epochs", 1, "--no-infosam")
    assert rows(tmp_path / "run")[0].keys() == {"step", "structure", "learning_rate"}


def test_infosam_acts_on_the_student(data: Path, tmp_path: Path) -> None:
    run(SAM, data, tmp_path / "with", "--epochs", 1)
    run(SAM, data, tmp_path / "without", "--epochs", 1, "--no-infosam")
    one, other = (weights(tmp_path / name / "epoch-001") for name in ("with", "without"))
    student = [key for key in one if "lora_B" in key]
    assert not any(torch.equal(one[key], other[key]) for key in student)
    structure = [rows(tmp_path / name)[0]["structure"] for name in ("with", "without")]
    assert structure[0] == structure[1]  # the same first batch and prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_teacher_cache(family: str, data: Path, tmp_path: Path, capsys) -> None:
    """The run that fills the cache, one that finds it, and about the one without it."""
    for name in ("fills", "finds"):
        options = ["--epochs", 1, "--teacher-cache", tmp_path / "cache"]
        run(FAMILIES[family], data, tmp_path / name, *options)
    assert "MB found in" in capsys.readouterr().out
    assert_same_run(tmp_path / "fills", tmp_path / "finds", "epoch-001")
    run(FAMILIES[family], data, tmp_path / "without", "--epochs", 1)
    one, other = (rows(tmp_path / name)[0] for name in ("fills", "without"))
    assert one["structure"] == other["structure"]
    assert one["infosam"] == pytest.approx(other["infosam"], rel=0.02)


def test_a_larger_teacher(data: Path, tmp_path: Path, monkeypatch) -> None:
    script = importlib.import_module("finetune_sam")
    built = []

    def build(name, checkpoint):
        model = tiny(name if name == "tiny" else "tiny", checkpoint if name == "tiny" else None)
        if name == "vit_l":
            model.model.image_encoder.blocks.append(model.model.image_encoder.blocks[0])
        built.append(model)
        return model

    tiny = script.build
    monkeypatch.setattr(script, "build", build)
    options = ["--teacher", "vit_l", "--teacher-checkpoint", "unused", "--epochs", 1]
    run(SAM, data, tmp_path / "run", *options)
    _, teacher = built
    assert not any(p.requires_grad for p in teacher.parameters())
    assert rows(tmp_path / "run")[0]["relation_cosine"] < 0.99
    assert rows(tmp_path / "run")[0]["distilled_information"] != 0


def test_collapse_is_reported(data: Path, tmp_path: Path, capsys) -> None:
    # Features alike for all samples: one image, listed eight times.
    folder = tmp_path / "one"
    folder.mkdir()
    for split in ("train", "val", "test"):
        with (data / f"{split}.csv").open() as file:
            first = next(csv.DictReader(file))
        lines = [f"{i},{data / first['image']},{data / first['label']}" for i in range(8)]
        (folder / f"{split}.csv").write_text("\n".join([",image,label", *lines]))
    run(SAM, folder, tmp_path / "run", "--epochs", 1, "--prompts", "boxes")
    assert capsys.readouterr().out.count("has collapsed to 0.0") == 1


def test_folders_instead_of_tables(data: Path, tmp_path: Path) -> None:
    for kind, ending in (("images", ".jpg"), ("masks", "_mask.png")):
        (tmp_path / kind).mkdir()
        for split in ("train", "val", "test"):
            for path in (data / split).glob(f"*{ending}"):
                name = f"{split}{path.name.removesuffix(ending)}{path.suffix}"
                (tmp_path / kind / name).write_bytes(path.read_bytes())
    script, *model = SAM
    folders = ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    options = [*folders, "--output", tmp_path / "run", "--epochs", 1, "--log-every", 1]
    importlib.import_module(script).main([*model, *map(str, options)])
    assert len(rows(tmp_path / "run")) == 10 // 4

    # One more pair would move others from training to test.
    for folder in (tmp_path / "images", tmp_path / "masks"):
        copy = next(folder.iterdir())
        (folder / f"new{copy.suffix}").write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="not those of the run"):
        importlib.import_module("evaluate").main([str(tmp_path / "run")])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(SystemExit, match="the same images for training"):
        importlib.import_module(script).main([*model, *map(str, options), "--resume"])


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
sys.path.insert(0, {examples!r})
import torch
from finetuning import checkpoint
from finetuning.logbook import Logbook

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
    code = PREAMBLE.format(examples=str(EXAMPLES)) + failure
    code += f"\nrunpy.run_path({str(EXAMPLES / 'finetune_sam.py')!r}, run_name='__main__')"
    common = ["--data", str(data), "--output", str(output), "--epochs", "3", "--threads", "1"]
    common += ["--log-every", "1", "--workers", "1", *options]
    return [sys.executable, "-c", code, *SAM[1:], *common]


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


@pytest.mark.parametrize("family", ["sam2", "transformers-sam"])
def test_resumed_in_another_process(family: str, data: Path, tmp_path: Path, monkeypatch) -> None:
    from finetuning import checkpoint

    options = ["--epochs", 2, "--log-every", 3]  # a row is not to reach over the epochs' border
    run(FAMILIES[family], data, tmp_path / "whole", *options)
    save = checkpoint.save

    def save_and_stop(*args) -> None:
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(FAMILIES[family], data, tmp_path / "parts", *options)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.manual_seed(99)  # nothing of this process is to be needed
    run(FAMILIES[family], data, tmp_path / "parts", *options, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "epoch-002")


def test_four_processes_train_what_one_loads(data: Path, tmp_path: Path, capsys) -> None:
    """One image a process: a Gram matrix over 4."""
    from finetuning.data import MaskedImages, collate, read_tables
    from finetuning.evaluation import evaluate
    from finetuning.trained import load_run

    script, *model = SAM
    options = ["--batch-size", 1, "--epochs", 2, "--teacher-cache", tmp_path / "cache", "--cpu"]
    common = ["--data", data, "--output", tmp_path / "run", "--workers", 0, "--log-every", 1]
    arguments = map(str, [*model, *common, *options, "--threads", 1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [sys.executable, *launch, str(EXAMPLES / f"{script}.py"), *arguments]
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
    assert evaluate(student, batches, "boxes", 1) == pytest.approx(result["test"], abs=1e-6)

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
    from finetuning.adaptation import adapt

    student = importlib.import_module(f"finetuning.{package}").build(name, None)
    report = adapt(student, method, targets=["qkv"])
    assert sum(p.numel() for p in student.encoder.parameters() if p.requires_grad) == count
    assert f"{count:,}" in report


def test_documented_commands_parse(monkeypatch) -> None:
    from finetuning.options import parse

    text = (EXAMPLES / "README.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "examples/finetune_" in line]
    commands = [line for line in commands if line.startswith(".venv/bin/")]
    assert len(commands) >= 14
    for line in commands:
        words = shlex.split(line, comments=True)
        at = next(i for i, word in enumerate(words) if word.startswith("examples/"))
        script, *arguments = words[at:]
        models = getattr(importlib.import_module(Path(script).stem), "MODELS", ())
        parse("", arguments, "", models)


def test_checkpoint_has_what_trains_and_nothing_else(data: Path, tmp_path: Path) -> None:
    run(SAM, data, tmp_path / "run", "--epochs", 1)
    folder = tmp_path / "run" / "epoch-001"
    assert {p.name for p in folder.iterdir()} == {
        "student.safetensors",
        "distiller.safetensors",
        "state.pt",
    }
    keys = load_file(folder / "student.safetensors").keys()
    assert all("lora_" in key or ".mask_decoder." in key for key in keys)
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() == {"epoch", "best", "optimizer", "schedule"}


# --- held wrong ----------------------------------------------------------------------------------


def outcome(data: Path, output: Path, capsys, *options: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(SAM, data, output, *options)
    return f"{exit_info.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 1], "--batch-size must be at least 2"),
        (["--batch-size", 16], "--batch-size must be at most the number of training images, 8"),
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


def test_wrong_outputs(data: Path, tmp_path: Path, capsys) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    assert "must be a new or empty folder" in outcome(data, full, capsys)

    run(SAM, data, tmp_path / "run", "--epochs", 1)
    (tmp_path / "run" / "result.json").rename(tmp_path / "result.json")
    assert "Go on with --resume" in outcome(data, tmp_path / "run", capsys, "--epochs", 1)
    changed = outcome(data, tmp_path / "run", capsys, "--epochs", 2, "--lr", 1, "--resume")
    assert "--epochs was 1, is 2; --lr was 0.0002, is 1.0" in changed
    (tmp_path / "result.json").rename(tmp_path / "run" / "result.json")
    finished = outcome(data, tmp_path / "run", capsys, "--epochs", 1, "--resume")
    assert "holds a finished run" in finished
