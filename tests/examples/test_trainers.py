"""The recipes for trainers print the same losses as a loop of one's own."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "trainers"
STEP = r"step (\d): segmentation ([\d.-]+), distillation ([\d.-]+)"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def found(text: str) -> list[list[float]]:
    """The losses of each step."""
    steps = re.findall(STEP, text)
    assert [int(number) for number, *_ in steps] == [0, 1, 2], text
    return [[float(value) for value in values] for _, *values in steps]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a recipe in this process, and return what it has printed."""
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def of_process(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def by_hand(run):
    return found(run("plain_loop.py"))


def close(values: list[list[float]], others: list[list[float]]) -> bool:
    return torch.allclose(*(torch.tensor(x) for x in (values, others)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["accelerate_loop.py", "checkpointing.py"])
def test_recipes_agree(name, run, by_hand):
    assert close(found(run(name)), by_hand)
    assert by_hand[0] != by_hand[1]


def test_checkpointed_layers_run_twice(run, monkeypatch):
    from transformers.models.sam.modeling_sam import SamTwoWayTransformer, SamVisionLayer

    ran = {SamVisionLayer: 0, SamTwoWayTransformer: 0}
    for kind in ran:
        forward = kind.forward

        def counted(self, *args, kind=kind, forward=forward, **kwargs):
            ran[kind] += torch.is_grad_enabled()
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    run("checkpointing.py", "--steps", "1")
    assert ran == {SamVisionLayer: 2 * 2, SamTwoWayTransformer: 1}  # two layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("lightning_trainer.py",),
        ("compiled.py",),
        (*TORCHRUN, "accelerate_loop.py", "--batch-size", "2"),
        (*TORCHRUN, "fsdp2.py", "--batch-size", "2"),
    ],
)
def test_slower_recipes_agree(command, tmp_path, by_hand):
    command = [str(FOLDER / part) if part.endswith(".py") else part for part in command]
    assert close(found(of_process(tmp_path, *command)), by_hand)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_lightning_on_two_devices(tmp_path):
    command = str(FOLDER / "lightning_trainer.py"), "--devices", "2", "--batch-size", "2"
    steps = found(of_process(tmp_path, *command))  # of other scenes, as Lightning mixes them
    assert all(distillation < -0.6 for _, distillation in steps)  # two samples alone have -1 / 2


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path):
    text = of_process(tmp_path, str(FOLDER / "hf_trainer.py"))
    trained, evaluated = (
        [float(value) for value in re.findall(rf"'{name}': '?([\d.-]+)", text)]
        for name in ("loss", "eval_loss")
    )
    assert len(trained) == len(evaluated) == 3
    # Evaluation is of segmentation alone; in training there is distillation, which is negative.
    assert all(value > 0.5 for value in evaluated)
    assert all(value < 0.5 for value in trained)
    assert [path.name for path in tmp_path.iterdir()] == ["hf_trainer_run"]
    assert not [*(tmp_path / "hf_trainer_run").iterdir()]
