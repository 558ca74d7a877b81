"""The README's first command, in a reduced setting."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from renyi_kd import InfoSAMDistiller

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    picture = tmp_path_factory.mktemp("quickstart") / "picture.png"
    options = ["--steps", "3", "--samples", "8", "--threads", "1", "--output", str(picture)]
    process = subprocess.run(
        [sys.executable, str(QUICKSTART), *options], check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, picture


def figures(output: str, row: str) -> list[list[float]]:
    """The figures of all rows of that name, in the order of the tables."""
    lines = [line for line in output.splitlines() if line.startswith(row.ljust(20) + " ")]
    return [[float(word) for word in line[20:].split()] for line in lines]


def test_tables(run) -> None:
    output, _ = run
    for name in ("filling the box", "teacher", "student", "student + InfoSAM"):
        ious = figures(output, name)[0]
        assert len(ious) == 2
        assert all(0 < iou < 1 for iou in ious), name
    for name in ("before training", "student", "student + InfoSAM"):
        compressed, distilled, entropy, cosine = figures(output, name)[-1]
        assert max(abs(compressed), abs(distilled), entropy) <= 2
        assert 0 < cosine <= 1


def test_both_students_see_the_same(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(QUICKSTART.parent))
    import quickstart

    seen: list[torch.Tensor] = []

    def recorded(boxes: torch.Tensor) -> torch.Tensor:
        seen.append(noised(boxes))
        return seen[-1]

    noised = quickstart.noised
    monkeypatch.setattr(quickstart, "noised", recorded)
    teacher, scenes = quickstart.load_teacher(), quickstart.make_scenes("target", 8, seed=0)
    for distiller in (None, InfoSAMDistiller(quickstart.DIM)):
        quickstart.finetune(teacher, scenes, steps=3, seed=0, distiller=distiller)
    torch.testing.assert_close(seen[:3], seen[3:], rtol=0, atol=0)


def test_student_starts_as_the_teacher(run) -> None:
    assert figures(run[0], "before training")[0][3] == 1.0


def test_picture(run) -> None:
    with Image.open(run[1]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10_000
