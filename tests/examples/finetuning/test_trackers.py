"""Trackers beside the tables: the same figures at the same steps, or one line before training."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from finetuning_runs import assert_tensorboard_has_the_tables, outcome, rows, run, stop_and_resume

from parts.options import TRACKERS


class Package(ModuleType):
    """In place of wandb or trackio: it keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.inits: list[dict] = []
        self.logged: list[tuple[int, str, float]] = []
        self.finished = 0

    def init(self, **how: object) -> "Package":
        self.inits.append(how)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged += [(step, name, value) for name, value in values.items()]

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def packages(monkeypatch) -> dict[str, Package]:
    found = {name: Package(name) for name in ("wandb", "trackio")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def test_every_tracker_gets_the_tables(packages, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "leaf"
    stop_and_resume("sam", data, output, ["--epochs", 2, "--track", *TRACKERS])
    assert_tensorboard_has_the_tables(output)
    expected = [
        (row["step"], f"{name}/{key}", pytest.approx(row[key]))
        for name in ("training", "validation")
        for row in rows(output, name)
        for key in row.keys() - {"step"}
    ]
    for package in packages.values():
        assert sorted(package.logged, key=str) == sorted(expected, key=str)
        assert [how["project"] for how in package.inits] == ["runs", "runs"]
        assert [how["name"] for how in package.inits] == ["leaf", "leaf"]
        assert package.inits[0]["config"]["method"] == "lora"
        assert str(data) not in json.dumps(package.inits[0]["config"])
        assert package.finished == 1
    assert [how["resume"] for how in packages["trackio"].inits] == ["never", "allow"]
    assert "track" not in json.loads((output / "options.json").read_text())


def test_no_tracker_at_all(data: Path, tmp_path: Path) -> None:
    run("sam", data, tmp_path / "run", "--epochs", 1, "--track")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert rows(tmp_path / "run")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_before_training(
    name: str, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    said = outcome(data, tmp_path / "run", capsys, "--track", name)
    assert said.startswith(f"error: --track {name} needs the package {name}; install it with `pip ")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start(packages, data: Path, tmp_path: Path, capsys) -> None:
    def refuse(**how: object) -> None:
        raise RuntimeError("no account\nand more")

    packages["wandb"].init = refuse
    said = outcome(data, tmp_path / "run", capsys, "--track", "wandb")
    assert said.startswith("error: --track wandb: no account")
    assert "and more" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trackio_itself(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run("sam", data, tmp_path / "runs" / "leaf", "--epochs", 1, "--track", "trackio")
    (stored,) = (tmp_path / "trackio").glob("runs*.db")
    assert stored.stat().st_size
