"""Runs that are stopped, go on, are moved, and are held wrong; nothing of the user's is touched."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import (
    FAMILIES,
    FAST_METHODS,
    FINETUNING,
    WEIGHTS,
    assert_same_run,
    assert_tensorboard_has_the_tables,
    outcome,
    rows,
    run,
    stop_and_resume,
    training_options,
    weights,
)
from grids import over
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import export
import pictures
from parts.models import huggingface
from parts.runs import checkpoint
from parts.runs.folder import read_options
from parts.runs.trained import load_teacher
from parts.training import loop

# --- stop and resume -----------------------------------------------------------------------------

# What strikes: a function, and what is done before it is called.
FAILURES = {
    "killed in the first epoch": "before(Logbook, 'training', lambda log, *_: kill())",
    "killed in a batch": "before(Logbook, 'training', lambda log, *_: log.step == 2 and kill())",
    "killed while writing weights": "before(checkpoint, 'save_file', half)",
    "killed while writing the state": "before(torch, 'save', half)",
    "killed before the rename": "before(Path, 'rename', lambda _, to: second(to) and kill())",
    "killed after the rename": "before(files, 'sync', lambda path: renamed(path) and kill())",
    "full disk": "before(Logbook, 'validation', lambda _, epoch, *__: epoch == 2 and limit())",
}
PREAMBLE = """
import os, resource, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {finetuning!r})
import torch
from parts import files
from parts.runs import checkpoint
from parts.training.logbook import Logbook

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
    path = path if isinstance(path, Path) else Path(path.name)
    if second(path):
        path.write_bytes(b"half")
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
    survived = {"killed in the first epoch": 0, "killed after the rename": 2}.get(failure, 1)
    names = [path.name for path in sorted(output.glob("epoch-???"))]
    assert names == [f"epoch-{epoch:03}" for epoch in range(1, survived + 1)]
    for name in names:
        for key, value in weights(uninterrupted / name).items():
            assert torch.equal(value, weights(output / name)[key])

    resumed = subprocess.run(
        command(data, output, "--resume"), check=False, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (f"resumed after epoch {survived}" in resumed.stdout) == (survived > 0)
    assert_same_run(uninterrupted, output, "epoch-003")
    assert_tensorboard_has_the_tables(output)
    assert not list(output.glob("*.unfinished"))


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


# --- nothing of the user's is touched ------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@over("error", [KeyboardInterrupt, OSError], slow=[RuntimeError])
@over("place", ["new/inside/of/others", "empty"], slow=["new"])
def test_a_start_that_failed_leaves_nothing(
    place: str, error: type[BaseException], data: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "empty").mkdir()

    def fail(*_) -> None:
        raise error("stop")

    monkeypatch.setattr(loop, "evaluate", fail)  # at the end of the first epoch
    with pytest.raises((error, SystemExit)):
        run("sam", data, tmp_path / place, "--epochs", 1)
    assert snapshot(tmp_path) == {"empty": None}
    monkeypatch.undo()
    run("sam", data, tmp_path / place, "--epochs", 1)  # nothing is in the way


def test_files_beside_a_run_stay(data: Path, tmp_path: Path, monkeypatch) -> None:
    """Tables of the user in the folder of a run that goes on, and of one that fails."""
    output = tmp_path / "run"
    run("sam", data, output, "--epochs", 1)
    own = {"notes.csv": "id,name\n17,x\n18,y\n", "patients.csv": "id,name\n17,x\n1,z\n"}
    own |= {"my.unfinished.txt": "mine"}
    for name, content in own.items():
        (output / name).write_text(content)
    run("sam", data, output, "--epochs", 2, "--resume")
    assert {name: (output / name).read_text() for name in own} == own
    for path in output.glob("epoch-*"):
        shutil.rmtree(path)  # as if the first epoch had not ended
    monkeypatch.setattr(loop, "evaluate", None)
    with pytest.raises(TypeError):
        run("sam", data, output, "--epochs", 2, "--resume")
    assert {name: (output / name).read_text() for name in own} == own


def test_a_folder_that_is_no_run_stays(data: Path, tmp_path: Path, capsys) -> None:
    """Though it has files and folders of the names that a run has."""
    output = tmp_path / "mine"
    (output / "tensorboard").mkdir(parents=True)
    (output / "draft.unfinished").mkdir()
    own = {"options.json": '{"my": 1}', "training.csv": "precious", "tensorboard/keep": ""}
    for name, content in own.items():
        (output / name).write_text(content)
    before = snapshot(output)
    for options in ([], ["--resume"]):
        said = outcome(data, output, capsys, "--epochs", 1, "--lr", 1e30, *options)
        assert "mine/options.json is damaged, it must have alpha, " in said
        (output / "options.json").unlink()
        assert "must be a new or empty folder" in outcome(data, output, capsys, *options)
        (output / "options.json").write_text(own["options.json"])
        assert snapshot(output) == before


def test_a_begun_run_stays_if_it_fails_again(
    trained, data: Path, tmp_path: Path, monkeypatch
) -> None:
    output = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    for path in output.glob("epoch-*"):
        shutil.rmtree(path)  # as if it had been killed in its first epoch
    before = snapshot(output).keys() - {"validation.csv"}  # whose rows were of later epochs
    monkeypatch.setattr(loop, "evaluate", None)
    with pytest.raises(TypeError):
        run("sam", data, output, "--resume")
    assert snapshot(output).keys() >= before


HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, {finetuning!r})
from parts.files import locked
with locked(Path({path!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Let another process hold a file, and kill it in the end."""
    code = HOLD.format(finetuning=str(FINETUNING), path=str(path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.kill()


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_one_process_trains_a_run(
    checkpoints: int, trained, data: Path, tmp_path: Path, capsys
) -> None:
    output = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    (output / "result.json").unlink()
    for path in sorted(output.glob("epoch-*"))[checkpoints:]:
        shutil.rmtree(path)
    before, options = snapshot(output), [*training_options("sam", "lora"), "--resume"]
    with held(output / "run.lock"):
        assert f"another process holds {output}/run.lock" in outcome(data, output, capsys, *options)
        assert snapshot(output) == before
    run("sam", data, output, *options)  # a killed process holds nothing
    assert (output / "result.json").exists()


def test_of_two_new_runs_one_trains(data: Path, tmp_path: Path, capsys) -> None:
    with held(tmp_path / "run.lock"):
        assert "another process holds" in outcome(data, tmp_path, capsys, "--epochs", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    run("sam", data, tmp_path, "--epochs", 1)  # what a kill left is not in the way


@pytest.mark.parametrize("name", ["state.pt", "distiller.safetensors", "training.csv", "cache"])
def test_a_bad_start_changes_nothing(
    name: str, trained, data: Path, tmp_path: Path, capsys
) -> None:
    output = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    options = [*training_options("sam", "lora"), "--epochs", 3, "--resume"]
    path = output / ("" if name.endswith(".csv") else "epoch-002") / name
    if name == "cache":
        options += ["--teacher-cache", __file__]
        message = "--teacher-cache must be a folder"
    elif name == "training.csv":
        path.write_bytes(b"step,loss\n1,\xff\n")
        message = f"{path} is damaged, a row must start with a number: "
    else:
        path.write_bytes(path.read_bytes()[:-1000])
        message = f"Remove {path.parent} to go on from the epoch before."
    before = snapshot(output)
    assert message in outcome(data, output, capsys, *options)
    assert snapshot(output) == before


def test_what_a_killed_start_left_is_not_in_the_way(data: Path, tmp_path: Path, capsys) -> None:
    left = [tmp_path / f"{name}.a_bc0123.unfinished" for name in ("options.json", "epoch-001")]
    mine = [tmp_path / "notes.a_bc0123.unfinished", tmp_path / "options.json.unfinished"]
    for path in (*left, *mine):
        path.mkdir()
    (tmp_path / "run.lock").touch()
    before = snapshot(tmp_path)
    assert "must be a new or empty folder" in outcome(data, tmp_path, capsys)
    assert snapshot(tmp_path) == before
    for path in mine:
        path.rmdir()
    run("sam", data, tmp_path, "--epochs", 1)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("function", ["digest_of_weights", "files.replace_json"])
def test_a_start_that_is_refused_late_leaves_no_folders(
    function: str, data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def unreadable(*_) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(f"parts.runs.folder.{function}", unreadable)
    assert "Input/output error" in outcome(data, tmp_path / "new" / "run", capsys)
    assert snapshot(tmp_path) == {}


# --- more epochs ---------------------------------------------------------------------------------


def test_epochs_may_grow(data: Path, tmp_path: Path, capsys) -> None:
    output, options = tmp_path / "run", ["--lr", 1e-3]
    run("sam", data, output, *options, "--epochs", 2)
    first = load_file(output / "epoch-002" / "student.safetensors")
    for epochs, message in ((2, "holds a finished run"), (1, "--epochs may grow, was 2, is 1")):
        asked = *options, "--epochs", epochs, "--resume"
        assert message in outcome(data, output, capsys, *asked)
    run("sam", data, output, *options, "--epochs", 3, "--resume")
    # What was done stays as it was; the rest follows the cosine over three epochs.
    again = load_file(output / "epoch-002" / "student.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert (output / "result.json").exists()
    assert [row["epoch"] for row in rows(output, "validation")] == [1, 2, 3]
    cosine = [1e-3 * (0.55 + 0.45 * np.cos(np.pi * step / 6)) for step in (5, 6)]
    assert [row["learning_rate"] for row in rows(output)[4:]] == pytest.approx(cosine)
    state = torch.load(output / "epoch-003" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4)


def test_the_first_step_after_more_epochs_has_their_rate(
    data: Path, tmp_path: Path, monkeypatch
) -> None:
    output, seen = tmp_path / "run", []
    run("sam", data, output, "--lr", 1e-3, "--epochs", 1)
    step = torch.optim.Adam.step

    def noted(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    run("sam", data, output, "--lr", 1e-3, "--epochs", 2, "--resume")
    cosine = [1e-3 * (0.55 + 0.45 * np.cos(np.pi * step / 4)) for step in (2, 3)]
    assert seen == pytest.approx(cosine)


# --- moved ---------------------------------------------------------------------------------------


@pytest.fixture
def moved(data: Path, tmp_path: Path) -> Path:
    """A run of one epoch whose data, weights, and own folder lie elsewhere by now."""
    before = tmp_path / "before"
    before.mkdir()
    shutil.copytree(data, before / "data")
    shutil.copy(WEIGHTS, before / "weights.safetensors")
    options = ["--checkpoint", before / "weights.safetensors", "--epochs", 1, "--seed", 2**32 - 1]
    run("sam", before / "data", before / "run", *options)
    return before.rename(tmp_path / "now")


def test_a_moved_run_goes_on_and_is_used(moved: Path, tmp_path: Path, capsys) -> None:
    weights, output = moved / "weights.safetensors", moved / "run"
    (moved / "link").symlink_to(moved / "data")
    options = ["--checkpoint", weights, "--epochs", 2, "--seed", 2**32 - 1, "--resume"]
    run("sam", moved / "link", output, *options)  # which is where the data is from now on
    evaluate.main([str(output), "--pretrained", "--output", str(tmp_path / "scores")])
    export.main([str(output), str(tmp_path / "exported.pth")])
    assert (tmp_path / "exported.pth").exists()


def test_a_moved_run_is_used_where_it_is(moved: Path, tmp_path: Path) -> None:
    places = ["--checkpoint", str(moved / "weights.safetensors")]
    export.main([str(moved / "run"), str(tmp_path / "exported.pth"), *places])
    places += ["--data", str(moved / "data")]
    scores = ["--output", str(tmp_path / "scores")]
    evaluate.main([str(moved / "run"), "--pretrained", *scores, *places])
    drawn = ["--output", str(tmp_path / "pictures"), "--formats", "png"]
    pictures.main([str(moved / "run"), *drawn, *places])


def test_what_a_moved_run_was_made_of_is_known_by_contents(moved: Path, capsys) -> None:
    output, weights = str(moved / "run"), moved / "weights.safetensors"

    def message(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_info:
            evaluate.main([output, *map(str, arguments)])
        return str(exit_info.value)

    assert "data/train.csv: No such file" in message("--checkpoint", weights)
    found = message("--data", moved / "data")
    assert "before/weights.safetensors is not there any more; say by --checkpoint" in found
    tensors = load_file(weights)
    tensors["mask_decoder.iou_token.weight"][0, 0] += 1
    save_file(tensors, moved / "others.safetensors")
    others = "--data", moved / "data", "--checkpoint", moved / "others.safetensors"
    assert "--checkpoint must be the one that the run started from" in message(*others)
    resume = ["--epochs", 2, "--seed", 2**32 - 1, "--resume"]
    found = outcome(moved / "data", moved / "run", capsys, *others[2:], *resume)
    assert "--checkpoint must be the one that the run started from" in found
    image = moved / "data" / "test" / "0000.jpg"
    original = image.read_bytes()
    Image.open(image).rotate(90).save(image)
    places = "--data", moved / "data", "--checkpoint", weights
    assert "for the test are not those of the run; evaluate.py takes" in message(*places)
    found = outcome(moved / "data", moved / "run", capsys, *places[2:], *resume)
    assert "for the test are not those of the run" in found
    image.write_bytes(original)
    image = moved / "data" / "train" / "0000.jpg"
    Image.open(image).rotate(90).save(image)
    assert "are not those of the run: with others, some that it has" in message(*places)
    found = outcome(moved / "data", moved / "run", capsys, *places[2:], *resume)
    assert "are not those of the run" in found
    assert "--images was not given to the run" in message("--images", moved)
    assert "--model was not given to the run" in message("--model", moved)


def test_folders_of_transformers_may_be_anywhere(data: Path, tmp_path: Path, monkeypatch) -> None:
    """A relative `--model`, and a teacher of another size; then both are moved."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    huggingface.tiny_sam().save_pretrained("model")
    huggingface.tiny_sam().save_pretrained("teacher")
    run("transformers-sam", data, Path("run"), "--model", "model", "--teacher", "teacher",
        "--epochs", 1)  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export.main(["../run", "exported"])
    shutil.move(tmp_path / "model", "model")
    shutil.move(tmp_path / "teacher", "teacher")
    with pytest.raises(SystemExit, match="model is not there any more; say by --model"):
        export.main(["../run", "again"])
    export.main(["../run", "again", "--model", "model"])
    assert (Path("again") / "model.safetensors").read_bytes() == (
        Path("exported") / "model.safetensors"
    ).read_bytes()
    given = Namespace(moved_teacher=Path("teacher"), moved_model=Path("model"))
    teacher = load_teacher(tmp_path / "run", given).model.state_dict()
    expected = load_file(Path("teacher") / "model.safetensors")
    assert all(torch.equal(teacher[key], value) for key, value in expected.items())
    with pytest.raises(SystemExit, match="--model must hold the weights that the run started from"):
        export.main(["../run", "third", "--model", "teacher"])


# --- numbers that are not finite -----------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    said = outcome(data, output, capsys, "--epochs", 2, "--lr", 1e30)
    assert "the structure loss of epoch 1, batch 2, is nan" in said
    assert said.count(".jpg") == 2  # the images of the batch
    assert not output.exists()


def test_nothing_of_a_broken_epoch_counts(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The second epoch breaks in its second batch, which a row of the log shares with the first."""
    output, options = tmp_path / "run", ["--epochs", 3, "--log-every", 7]
    structure_loss, calls = loop.structure_loss, []

    def broken(*args, **kwargs):
        calls.append(None)
        loss = structure_loss(*args, **kwargs)
        return loss * torch.nan if len(calls) == 4 else loss

    monkeypatch.setattr(loop, "structure_loss", broken)
    said = outcome(data, output, capsys, *options)
    assert "the structure loss of epoch 2, batch 2, is nan" in said
    assert [row["epoch"] for row in rows(output, "validation")] == [1]
    assert [path.name for path in output.glob("epoch-*")] == ["epoch-001"]
    assert not (output / "result.json").exists()
    monkeypatch.undo()
    run("sam", data, output, *options, "--resume")
    assert len(rows(output, "validation")) == 3


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(
    trained, data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    output, step, calls = tmp_path / "run", torch.optim.Adam.step, []

    def overflow(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 2:  # after the last loss, which is finite
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.inf

    monkeypatch.setattr(torch.optim.Adam, "step", overflow)
    said = outcome(data, output, capsys, "--epochs", 1)
    assert "epoch 1 broke the student; train with a smaller --lr: 1 of " in said
    assert not output.exists()
    monkeypatch.undo()

    damaged = shutil.copytree(trained("sam", "lora"), output)
    path = next(damaged.glob("epoch-*/student.safetensors"))
    for path in damaged.glob("epoch-*/student.safetensors"):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = torch.inf
        save_file(tensors, path)
    with pytest.raises(SystemExit, match="must hold finite weights: 1 of "):
        export.main([str(damaged), str(tmp_path / "x.pth")])


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("options.json", b"{", "options.json must be JSON"),
        ("options.json", b"[1]", "options.json is damaged, it must have"),
        ("options.json", b"{}", "options.json is damaged, it must have"),
        ("epoch-002/state.pt", b"half", "state.pt is damaged: "),
        ("epoch-001/student.safetensors", b"half", "student.safetensors is damaged: "),
        ("epoch-002/student.safetensors", b"half", "student.safetensors is damaged: "),
        ("epoch-001/student.safetensors", b"half", "Use another epoch."),
        ("epoch-002/student.safetensors", None, "student.safetensors is missing. Remove "),
        ("epoch-002/state.pt", b"", "state.pt is damaged: "),
        ("epoch-002/state.pt", None, "state.pt is missing. Remove "),
    ],
)
def test_damaged_files_of_a_run_are_one_line(
    name: str, content: bytes | None, message: str, trained, tmp_path: Path
) -> None:
    damaged = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content)
    epoch = ["--epoch", name[8]] if name.endswith(".safetensors") else []
    with pytest.raises(SystemExit) as exit_info:
        export.main([str(damaged), str(tmp_path / "x.pth"), *epoch])
    assert message in str(exit_info.value)
    assert "\n" not in str(exit_info.value)


@pytest.mark.parametrize("best", [None, 3, {}, {"epoch": 1}, {"epoch": "1", "iou": 0.5}])
def test_a_state_without_the_best_epoch_is_damaged(best: object, tmp_path: Path) -> None:
    path = tmp_path / "epoch-002"
    path.mkdir()
    torch.save({"epoch": 2} | ({} if best is None else {"best": best}), path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt is damaged: .*Remove .* to go on from"):
        checkpoint.load_state(path)


def test_an_error_of_the_system_in_a_damaged_state_names_it(tmp_path: Path, monkeypatch) -> None:
    """PyTorch goes to places that are not in a file that was cut short."""

    def seek(*_, **__) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(torch, "load", seek)
    with pytest.raises(ValueError, match=r"state.pt is damaged: .*Invalid argument"):
        checkpoint.load_state(tmp_path / "epoch-002")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("package", "os", "package must be one of sam, sam2, huggingface, got 'os'"),
        ("package", [], "package must be one of sam, sam2, huggingface, got []"),
        ("model", "vit_x", "model must be one of vit_b, vit_l, vit_h, small, tiny, got 'vit_x'"),
        ("teacher", 3, "teacher must be one of vit_b, vit_l, vit_h, small, tiny or null, got 3"),
        ("rank", "four", "rank must be a whole number from 1 to 2147483647, got 'four'"),
        ("rank", True, "rank must be a whole number from 1 to 2147483647, got True"),
        ("epochs", None, "epochs must be a whole number from 1 to 2147483647, got None"),
        ("seed", 2**32, "seed must be a whole number from 0 to 4294967295, got 4294967296"),
        ("targets", "qkv", "targets must be a list of names, got 'qkv'"),
        ("data", 5, "data must be a path, got 5"),
        ("data", None, "data must be a path, got None"),
        ("checkpoint", "a\0", "checkpoint must be a path or null, got 'a\\x00'"),
        ("foreground", "abc", "foreground must be a list of pairs, got 'abc'"),
        ("ignore", [[2, 1]], "ignore must be a list of pairs, got [[2, 1]]"),
        ("image_range", [1, 1], "image_range must be a pair of numbers that rises or null"),
        ("alpha", 0, "alpha must be a number above 0, got 0"),
        ("digests", {"data": None}, "digests must be texts by name, got {'data': None}"),
        ("distiller", "crd", "distiller must be one of infosam, logit, "),
        ("distiller_weight", -1, "distiller_weight must be a number from 0, got -1"),
        ("layers", [1.5], "layers must be a list of whole numbers or null, got [1.5]"),
        ("relation", None, "relation must be one of attention-1, "),
        ("freeze_relation", 0, "freeze_relation must be true or false, got 0"),
    ],
)
def test_wrong_values_of_options_json_are_named(
    name: str, value: object, message: str, trained, tmp_path: Path
) -> None:
    content = json.loads((trained("sam", "lora") / "options.json").read_text())
    (tmp_path / "options.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/options.json: {message}")):
        read_options(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"epochs": null}', "null"])
def test_resuming_without_whole_options_is_refused(
    content: str, trained, data: Path, tmp_path: Path, capsys
) -> None:
    damaged = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    (damaged / "options.json").write_text(content)
    options = [*training_options("sam", "lora"), "--epochs", 3, "--resume"]
    assert "options.json is damaged, it must have" in outcome(data, damaged, capsys, *options)


def test_weights_of_another_rank_are_refused(trained, tmp_path: Path) -> None:
    damaged = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    content = json.loads((damaged / "options.json").read_text())
    (damaged / "options.json").write_text(json.dumps(content | {"rank": 3}))
    with pytest.raises(SystemExit, match="Was the model adapted in the same way"):
        export.main([str(damaged), str(tmp_path / "x.pth")])


@pytest.mark.parametrize("name", ["training", "validation"])
def test_damaged_tables_of_a_run_are_one_line(
    name: str, trained, data: Path, tmp_path: Path, capsys
) -> None:
    damaged = shutil.copytree(trained("sam", "lora"), tmp_path / "run")
    (damaged / f"{name}.csv").write_text("step,iou\nhalf,a\n")
    with pytest.raises(SystemExit, match=f"{name}.csv is damaged, its cells must be numbers"):
        pictures.main([str(damaged), "--output", str(tmp_path / "pictures")])
    options = [*training_options("sam", "lora"), "--epochs", 3, "--resume"]
    assert f"{name}.csv is damaged" in outcome(data, damaged, capsys, *options)
    assert (damaged / "epoch-002").exists()


# --- held wrong ----------------------------------------------------------------------------------


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
        (["--rank", 10**8], "--rank must be at most 96, the width of a layer, got 100000000"),
        (["--rank", 97, "--method", "lora-heads"], "--rank must be at most 96"),
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
    changed = outcome(data, stopped, capsys, *options, "--rank", 3, "--lr", 1, "--resume")
    assert "--lr was 0.001, is 1.0; --rank was 4, is 3" in changed
