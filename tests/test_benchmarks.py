"""The benchmarks that are programs of their own, rehearsed in their reduced form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetuning_runs import make_data

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
RESULTS = {
    "tests": ["cuda-tests.txt", "default-device-tests.txt"],
    "kernels": ["kernels.md"],
    "loss": ["*.md", "*.png"],
    "routes": ["routes-*.md", "routes-*.png"],
    "step": ["step.txt"],
    "mixed": ["mixed.md"],
    "evidence": ["evidence.txt"],
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPT, *arguments]
    # Inside, pytest runs again, and not as the worker of this one.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def evidence(folder: Path) -> tuple[object, ...]:
    """Make what the evidence reads, and return what names it."""
    for name in ("general", "mine"):
        make_data(folder / name, train=24, val=1, test=1)
    (folder / "teacher.safetensors").touch()
    return "rates", "--data", folder, "--teacher", folder / "teacher.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("part", RESULTS)
def test_each_part_runs_and_leaves_its_results(part, tmp_path):
    if part in ("loss", "routes"):
        pytest.importorskip("pytest_benchmark")  # of the extra `benchmarks`
    others = evidence(tmp_path) if part == "evidence" else ()
    done = run(part, tmp_path / "results", *others)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for pattern in RESULTS[part]:
        (found,) = (tmp_path / "results").glob(pattern)
        assert found.stat().st_size > 50


def test_an_unknown_part_is_named(tmp_path):
    done = run("speed", tmp_path)
    assert done.returncode == 2
    assert "no part speed: tests, kernels, loss" in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_costs_of_the_compared_systems_are_tables():
    command = [sys.executable, SCRIPT.with_name("compared.py"), "--small", "--rounds", "1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    for name in ("semckd", "hq-sam"):
        (row,) = (row for row in rows if row[0].strip() == name)
        assert all(cell.strip() for cell in row)
