"""The command line: what is refused, in which words, before anything else is done."""

import argparse
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from finetuning_runs import outcome, run
from hypothesis import given

from parts.options import number, order, parse_training, place, values, whole

REQUIRED = ["--model", "tiny", "--data", "data", "--output", "run"]

WRONG = {
    "--epochs 0": "--epochs: must be at least 1, got 0",
    "--epochs 1.5": "--epochs: must be a whole number, got 1.5",
    "--epochs 99999999": "--epochs: must be at most 1000000, got 99999999",
    "--batch-size -1": "--batch-size: must be at least 1, got -1",
    "--rank 99999999999999999999": "--rank: must be at most 2147483647",
    "--seed -1": "--seed: must be at least 0, got -1",
    "--seed 4294967296": "--seed: must be at most 4294967295, got 4294967296",
    "--lr 0": "--lr: must be above 0, got 0",
    "--lr nan": "--lr: must be finite and within 1e+30, got nan",
    "--lr 1e400": "--lr: must be finite and within 1e+30, got 1e400",
    "--lr fast": "--lr: must be a number, got fast",
    "--compression-weight inf": "--compression-weight: must be finite",
    "--compression-weight -1": "--compression-weight: must be at least 0, got -1",
    "--distillation-weight nan": "--distillation-weight: must be finite",
    "--alpha 0": "--alpha: must be above 0, got 0",
    "--alpha nan": "--alpha: must be finite",
    "--validate-every 0": "--validate-every: must be at least 1, got 0",
    "--start-weight -1": "--start-weight: must be at least 0, got -1",
    "--shuffled-teacher --distiller vid": "--shuffled-teacher needs --distiller infosam or logit",
    "--shuffled-teacher --distiller none": "--shuffled-teacher needs --distiller infosam or logit",
    "--shuffled-teacher --batch-size 1": "--shuffled-teacher needs a --batch-size of at least 2",
    "--workers -1": "--workers: must be at least 0, got -1",
    "--threads 0": "--threads: must be at least 1, got 0",
    "--foreground 3-1": "--foreground: must be a value such as 2 or a range such as 128-255, got",
    "--foreground leaf": "--foreground: must be a value such as 2 or a range such as 128-255, got",
    "--ignore nan": "--ignore: must be a value such as 2 or a range such as 128-255, got nan",
    "--image-range 0": "--image-range: expected 2 arguments",
    "--image-range 9 0": "--image-range must rise, got 9 and 0",
    "--images somewhere --masks elsewhere": "give either --data or both --images and --masks",
    "--images somewhere": "give either --data or both --images and --masks",
    "--teacher vit_h": "--teacher-checkpoint is needed for vit_h",
    "--teacher-checkpoint x.pth": "--teacher-checkpoint needs --teacher",
    "--points 1001": "--points: must be at most 1000, got 1001",
    "--eval-points 1001": "--eval-points: must be at most 1000, got 1001",
    "--model vit_b": "--checkpoint is needed for vit_b",
    "--augment --teacher-cache c": "--augment changes in every epoch; leave one of them out",
    "--track aim": "--track: invalid choice: 'aim'",
    "--epoch 1 --metod lora": "unrecognized arguments: --metod lora",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(options: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_training("", [*REQUIRED, *options.split()], "sam")
    assert exit_info.value.code == 2
    assert WRONG[options] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 1], "--batch-size must be at least 2"),
        (["--batch-size", 16], "--batch-size must be at most the number of training images, 4"),
        (["--targets", "query"], "linear layers are called lin1, lin2, proj, qkv"),
        (["--precision", "fp16", "--cpu"], "fp16 needs a GPU"),
        (["--checkpoint", "nowhere.pth"], "--checkpoint must be a readable file"),
        (["--model", "vit_b"], "--checkpoint must be of vit_b"),
        (["--test-table", "test_other.csv"], "test_other.csv: No such file"),
        (["--teacher-cache", __file__], "--teacher-cache must be a folder with"),
    ],
)
def test_options_that_do_not_fit(
    options: list[object], message: str, data: Path, tmp_path: Path, capsys
) -> None:
    assert message in outcome(data, tmp_path / "new" / "run", capsys, *options)
    assert not (tmp_path / "new").exists()  # so that the next attempt may use the name


def read(reader, text: str) -> object:
    """What an option reads of a text, or None if it refuses it with a message."""
    try:
        return reader(text)
    except argparse.ArgumentTypeError as error:
        return None if str(error).startswith("must be ") else error


texts = st.one_of(st.text(max_size=9), st.floats().map(str), st.integers().map(str))


@given(texts)
def test_any_text_for_a_number(text: str) -> None:
    found = read(number(0), text)
    assert found is None or (isinstance(found, float) and 0 <= found <= 1e30)
    found = read(number(0, exclusive=True), text)
    assert found is None or 0 < found <= 1e30
    found = read(whole(1, 100), text)
    assert found is None or found in range(1, 101)
    found = read(order, text)
    assert found is None or found > 0
    found = read(values, text)
    assert found is None or 0 <= found[0] <= found[1] < math.inf


def test_paths_do_not_depend_on_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("runs/leaf") == tmp_path / "runs" / "leaf"
    options = parse_training("", REQUIRED, "sam")
    monkeypatch.chdir("/")
    assert (options.data, options.output) == (tmp_path / "data", tmp_path / "run")


def test_values_of_masks_are_values_and_ranges() -> None:
    options = parse_training("", [*REQUIRED, "--foreground", "1", "128-255"], "sam")
    assert options.foreground == [(1, 1), (128, 255)]


def test_large_seeds_train(data: Path, tmp_path: Path) -> None:
    run("sam", data, tmp_path / "run", "--epochs", 1, "--seed", 20240101)
    assert (tmp_path / "run" / "result.json").exists()
