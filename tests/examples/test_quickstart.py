"""The README's first command, in a reduced setting."""

import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from finetuning_runs import QUICKSTART
from PIL import Image

import quickstart
from renyi_kd import InfoSAMDistiller
from teacher import load_teacher

# Without the packages that the fine-tuning programs need, and the extra `examples` has not.
WITH_ITS_EXTRA = """
import runpy, sys
from pathlib import Path
others = "lightning", "py_sod_metrics", "pycocotools", "sam2", "tensorboard", "timm"
sys.modules |= dict.fromkeys(others)
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", params=["main", pytest.param("script", marks=pytest.mark.slow)])
def run(request, tmp_path_factory) -> tuple[str, Path]:
    """What is printed, and the picture, of a run in this process or in one of its own."""
    picture = tmp_path_factory.mktemp("quickstart") / "picture.png"
    options = ["--steps", "2", "--samples", "4", "--threads", "1", "--output", str(picture)]
    if request.param == "main":
        with redirect_stdout(io.StringIO()) as printed:
            quickstart.main(options)
        return printed.getvalue(), picture
    process = subprocess.run(
        [sys.executable, "-c", WITH_ITS_EXTRA, str(QUICKSTART / "quickstart.py"), *options],
        check=False,
        capture_output=True,
        text=True,
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
    seen: list[torch.Tensor] = []

    def recorded(boxes: torch.Tensor) -> torch.Tensor:
        seen.append(noised(boxes))
        return seen[-1]

    noised = quickstart.noised
    monkeypatch.setattr(quickstart, "noised", recorded)
    teacher, scenes = load_teacher(), quickstart.make_scenes("target", 8, seed=0)
    for distiller in (None, InfoSAMDistiller(quickstart.DIM)):
        quickstart.finetune(teacher, scenes, steps=2, seed=0, distiller=distiller)
    torch.testing.assert_close(seen[:2], seen[2:], rtol=0, atol=0)


def test_student_starts_as_the_teacher(run) -> None:
    assert figures(run[0], "before training")[0][3] == 1.0


def test_picture(run) -> None:
    with Image.open(run[1]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10_000
    assert {path.suffix for path in run[1].parent.iterdir()} == {".png", ".pdf", ".svg"}
    text = run[1].with_suffix(".svg").read_text()
    assert text.count(">mean IoU<") == 3  # teacher and both students
    assert text.count(">IoU ") == 3 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "6"], "--samples must be a multiple of 4, got 6"),
        (["--steps", "0"], "--steps and --threads must be positive"),
        (["--output", "picture.jpg"], "--output must end in .png, got picture.jpg"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(options)
    assert message in capsys.readouterr().err
