"""The programs as a user calls them, by the commands of the pages."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finetuning_runs import FINETUNING, QUICKSTART, WEIGHTS, run
from PIL import Image

import evaluate
import export
import pictures
import predict
from parts.options import parse_training

PROGRAMS = sorted(path.name for path in FINETUNING.glob("*.py"))


def call(
    name: str,
    *arguments: object,
    folder: Path = FINETUNING,
    code: int = 0,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Call a program in the current folder, as a user would."""
    done = subprocess.run(
        [sys.executable, str(folder / name), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert done.returncode == code, done.stderr
    return done


def test_documented_commands_parse() -> None:
    text = (FINETUNING / "README.md").read_text().replace("\\\n", " ")
    packages = {"sam": "sam", "sam2": "sam2", "transformers": "huggingface"}
    parsed = 0
    for line in text.splitlines():
        if not line.startswith(".venv/bin/"):
            continue
        words = shlex.split(line, comments=True)
        files = [word for word in words if word.startswith("examples/")]
        assert files
        assert all((FINETUNING.parents[1] / file).is_file() for file in files), line
        script, *arguments = words[words.index(files[0]) :]
        if (name := Path(script).stem).startswith("finetune_"):
            parse_training("", arguments, packages[name.removeprefix("finetune_")])
            parsed += 1
    assert parsed >= 14


# Importing the libraries takes seconds; what a user mistypes is to be said at once.
LIGHT = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "transformers", "matplotlib", "scipy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("option", ["--help", "--no-such-option"])
def test_help_and_misspelt_options_import_nothing_that_takes_time(
    program: str, option: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(FINETUNING / program), option],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if option == "--help" else 2), done.stderr
    assert done.stdout.endswith("[]\n")


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_in_a_locale_without_utf_8(program: str) -> None:
    assert call(program, "--help", **ASCII).stdout.isascii()


@pytest.mark.slow
def test_a_locale_without_utf_8(trained, tmp_path: Path, monkeypatch) -> None:
    """The table has a plus-minus sign, and the run another letter."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        copy = shutil.copytree(trained("sam", "lora"), tmp_path / f"r\u00e4nyi-{seed}")
        options = json.loads((copy / "options.json").read_text())
        (copy / "options.json").write_text(json.dumps(options | {"seed": seed}))
    names = [path.name for path in tmp_path.iterdir()]
    said = call("evaluate.py", *sorted(names), "--output", "scores", **ASCII).stdout
    assert r"mean \xb1 standard deviation" in said
    assert (tmp_path / "scores" / "scores.json").exists()
    refused = call("evaluate.py", "n\u00e4", code=1, **ASCII)
    assert refused.stderr.isascii()
    assert refused.stderr.count("\n") == 1


def test_every_program_ends_with_its_results_and_what_comes_next(
    data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    run("sam", data, Path("run"), "--epochs", 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'run'} holds the run. Next: python ")
    for program, arguments in (
        (evaluate, ["run", "--output", "scores"]),
        (pictures, ["run", "--formats", "png", "--output", "pictures"]),
        (predict, ["run", str(data / "test"), "--box", "9", "9", "99", "99", "--output", "masks"]),
        (export, ["run", "exported.pth"]),
    ):
        program.main(arguments)
        *_, before, last = capsys.readouterr().out.splitlines()
        assert arguments[-1] in f"{before}{last}"
        if program is not export:
            assert last.startswith("Next: python ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "method"),
    [
        ("finetune_sam.py", ["tiny", "--checkpoint", WEIGHTS], "lora"),
        ("finetune_sam2.py", ["tiny"], "adapter"),
    ],
)
def test_from_training_to_masks_by_the_documented_commands(
    script: str, model: list[str], method: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--train", 8, "--val", 2, "--test", 5]
    call("make_dataset.py", "data", *sizes, folder=QUICKSTART)
    options = ["--data", "data", "--epochs", 2, "--method", method, "--teacher-cache", "cache"]
    call(script, "--model", *model, *options, "--output", "run")
    assert "run before" in call("evaluate.py", "run", "--pretrained", "--output", "scores").stdout
    drawn = call("pictures.py", "run", "--output", "pictures").stdout
    for name in ("predictions", "relations", "epochs", "histograms", "curves"):
        assert f"{name}.png" in drawn
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # something is drawn
    assert "exported.pt" in call("export.py", "run", "exported.pt").stdout
    boxes = [["0000.jpg", 60, 50, 180, 190], ["0003.jpg", 60, 50, 180, 190]]
    lines = [",".join(map(str, row)) for row in boxes]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x0,y0,x1,y1", *lines]))
    call("predict.py", "run", "boxes.csv", "--images", "data/test", "--output", "masks")
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"0000.png", "0003.png"}
