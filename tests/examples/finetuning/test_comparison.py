"""Runs side by side: every row counts, and seeds are called so only where they differ."""

import csv
import json
import os
import shlex
import shutil
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from finetuning_runs import make_data, run, training_options
from PIL import Image

import evaluate
import pictures
from parts import files
from parts.data.check import check
from parts.data.tables import read_tables
from parts.evaluation import comparison
from parts.runs.trained import average, load_run, merge_lora


def test_evaluate_runs(trained, data: Path, tmp_path: Path, capsys) -> None:
    # Two runs that differ in nothing but their seed, and one of another method.
    runs = [str(trained("sam", "lora")), str(tmp_path / "other seed"), str(tmp_path / "decoder")]
    run("sam", data, Path(runs[1]), *training_options("sam", "lora"), "--seed", 1)
    run("sam", data, Path(runs[2]), "--method", "decoder", "--epochs", 1)
    capsys.readouterr()
    arguments = [*runs, "--pretrained", "--output", str(tmp_path / "scores")]
    evaluate.main(arguments)
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "scores" / "scores.json").read_text())
    # The weights before training are those of one checkpoint, whatever the seed and the method.
    assert [*result["runs"]] == [*runs, f"{runs[0]} before"]
    for name in runs:
        test = json.loads((Path(name) / "result.json").read_text())["test"]
        assert result["runs"][name]["iou"] == pytest.approx(test["iou"], abs=1e-6)
        assert result["runs"][name]["dice"] == pytest.approx(test["dice"], abs=1e-6)
        assert name in table
    assert result["runs"][f"{runs[0]} before"] != result["runs"][runs[0]]
    both = [result["runs"][name]["s_measure"] for name in runs[:2]]
    assert [*result["seeds"]] == [shlex.join(runs[:2])]
    found = result["seeds"][shlex.join(runs[:2])]
    assert found["mean"]["s_measure"] == pytest.approx(mean(both))
    assert found["standard deviation"]["s_measure"] == pytest.approx(stdev(both))
    assert f"the 2 seeds of {runs[0]}" in table
    images = [row for row in table_of(tmp_path / "scores") if row["run"] == runs[0]]
    assert [row["row"] for row in images] == ["0", "1"]
    assert mean(float(row["iou"]) for row in images) == pytest.approx(
        result["runs"][runs[0]]["iou"]
    )
    evaluate.main([runs[0], "--output", str(tmp_path / "paper"), "--paper", "--split", "val"])
    paper = json.loads((tmp_path / "paper" / "scores.json").read_text())
    assert paper["split"] == "val"
    assert paper["paper"]


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open(encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def test_other_data_and_averaged_weights(trained, tmp_path: Path, capsys) -> None:
    run = str(trained("sam", "lora"))
    other = make_data(tmp_path / "other", train=2, val=1, test=3)
    asked = [run, "--on", str(other), "--prompts", "points", "--points", "1", "--pretrained"]
    evaluate.main([*asked, "--average", "0", "0.5", "--output", str(tmp_path / "scores")])
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())["runs"]
    assert [*found] == [run, f"{run} 0 averaged", f"{run} 0.5 averaged", f"{run} before"]
    assert found[f"{run} 0 averaged"] == pytest.approx(found[f"{run} before"], abs=1e-6)
    own = {values["s_measure"] for values in found.values()}
    assert len(own) >= 3
    images = {row["image"] for row in table_of(tmp_path / "scores")}
    assert len(images) == 3
    assert all(image.startswith(str(other)) for image in images)


def test_averaged_weights_are_those_between(trained) -> None:
    run = trained("sam", "lora")
    student, start = load_run(run)[0], load_run(run, 0)[0]
    merged = load_run(run)[0]
    merge_lora(merged.model)
    before, after = start.state_dict(), merged.state_dict()
    average(student, start, 0.75)
    moved = 0
    for name, value in student.state_dict().items():
        expected = 0.25 * before[name].double() + 0.75 * after[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        moved += not torch.equal(before[name], after[name])
    assert moved > 20
    assert any("qkv" in name and not torch.equal(before[name], after[name]) for name in before)


def test_layers_of_their_own_are_not_averaged(trained, tmp_path: Path) -> None:
    copy = copy_of_a_run(trained("sam", "lora"), tmp_path / "copy", method="adapter")
    with pytest.raises(SystemExit, match="--average needs a method that is merged"):
        evaluate.main([copy, "--average", "0.5"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--average", "2"], "--average must be from 0 to 1, got 2"),
        (["--average", "nan"], "--average"),
        (["--points", "3"], "--points needs --prompts points"),
        (["--points", "3", "--prompts", "boxes"], "--points needs --prompts points"),
        (["--on", "there", "--data", "here"], "--on takes other data"),
    ],
)
def test_options_without_a_use_are_refused(asked: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["run", *asked])
    assert message in capsys.readouterr().err


def test_results_replace_nothing(trained, tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "images.csv").write_text("theirs")
    with pytest.raises(SystemExit, match="scores exists; nothing is written over it"):
        evaluate.main([str(trained("sam", "lora")), "--output", str(tmp_path / "scores")])
    assert [path.read_text() for path in (tmp_path / "scores").iterdir()] == ["theirs"]


def test_a_run_given_twice_is_one_run(trained, tmp_path: Path, capsys) -> None:
    """Under its name, by a link, and as a copy, which has the same seed."""
    run = trained("sam", "lora")
    (tmp_path / "link").symlink_to(run)
    shutil.copytree(run, tmp_path / "copy")
    capsys.readouterr()
    again = [str(run), str(tmp_path / "link"), str(tmp_path / "copy")]
    evaluate.main([str(run), *again, "--output", str(tmp_path / "scores")])
    said = capsys.readouterr().out
    assert said.count("and is evaluated once") == 2
    assert f"{tmp_path / 'copy'} has the seed of {run}" in said
    assert "seeds of" not in said
    result = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert [*result["runs"]] == [str(run), str(tmp_path / "copy")]
    assert result["seeds"] == {}


def test_random_weights_differ_in_their_seeds(data: Path, tmp_path: Path, capsys) -> None:
    """Without a checkpoint the seed draws the weights, so that the models before differ."""
    runs = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    for seed, output in enumerate(runs):
        run("transformers-sam", data, output, "--epochs", 1, "--seed", seed)
    assert "has random weights" in capsys.readouterr().out
    evaluate.main([*map(str, runs), "--pretrained", "--output", str(tmp_path / "scores")])
    result = json.loads((tmp_path / "scores" / "scores.json").read_text())
    names = [*map(str, runs), *(f"{name} before" for name in runs)]
    assert [*result["runs"]] == names
    assert [*result["seeds"]] == [shlex.join(names[:2]), shlex.join(names[2:])]


def copy_of_a_run(run: Path, copy: Path, **changes: object) -> str:
    """Copy a run, and change its options as if they had been others."""
    shutil.copytree(run, copy)
    options = json.loads((copy / "options.json").read_text())
    (copy / "options.json").write_text(json.dumps(options | changes))
    return str(copy)


@pytest.fixture
def retested(trained, data: Path, tmp_path: Path) -> Path:
    """A copy of a run with another seed, and with another image for the test."""
    run, other = trained("sam", "lora"), shutil.copytree(data, tmp_path / "other")
    Image.open(other / "test" / "0000.jpg").rotate(180).save(other / "test" / "0000.jpg")
    digests = json.loads((run / "options.json").read_text())["digests"]
    digests["test"] = check(read_tables(other)).tested_on
    copy = tmp_path / "retested"
    return Path(copy_of_a_run(run, copy, seed=1, data=str(other), digests=digests))


def asked(*runs: Path, **others: object) -> list[comparison.Asked]:
    arguments = {"runs": list(runs), "pretrained": False, "average": []}
    arguments |= dict.fromkeys(("test_table", "on", "prompts", "points"))
    return comparison.models(Namespace(**arguments | others))


def test_seeds_are_compared_on_the_same_test_set(trained, retested: Path, data: Path) -> None:
    run = trained("sam", "lora")
    assert comparison.groups_of_seeds(asked(run, retested)) == []
    models = asked(run, retested, pretrained=True)
    assert [model.name for model in models[2:]] == [f"{run} before", f"{retested} before"]
    # Its data moved to where the other's are, which then are those that were asked for.
    with pytest.raises(ValueError, match="retested: the images and masks for the test are not"):
        asked(retested, moved_data=data)
    models = asked(run, retested, moved_data=data, test_table="test.csv", pretrained=True)
    assert comparison.groups_of_seeds(models[:2]) == [[str(run), str(retested)]]
    assert len(models) == 3


def test_pictures_are_of_runs_with_the_same_data(trained, retested: Path, tmp_path: Path) -> None:
    runs = [str(trained("sam", "lora")), str(retested)]
    with pytest.raises(SystemExit, match="retested: the images and masks for the test are not"):
        pictures.main([*runs, "--output", str(tmp_path / "pictures")])


def test_runs_called_before_are_not_the_model_before(trained, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a before"):
        copy_of_a_run(trained("sam", "lora"), Path(name))
    runs = Path("a"), Path("a before")
    names = [model.name for model in asked(*runs, pretrained=True)]
    assert names == ["a", "a before", "a before training"]


def test_a_place_that_cannot_be_written_is_told_at_once(
    trained, tmp_path: Path, monkeypatch
) -> None:
    def read_only(*_, dir: Path, **__) -> None:
        raise PermissionError(13, "Permission denied", f"{dir}/scores.abcdefgh.unfinished")

    monkeypatch.setattr(files, "mkdtemp", read_only)
    monkeypatch.setattr(comparison, "evaluate", None)
    output = tmp_path / "scores"
    with pytest.raises(SystemExit, match=f"^error: {output}: Permission denied .choose a place"):
        evaluate.main([str(trained("sam", "lora")), "--output", str(output)])


def test_several_objects_of_an_image(data: Path, tmp_path: Path) -> None:
    """Each row of the table counts, as in training, though their images are the same."""
    rows = [f"{data}/test/{i:04}.jpg,{data}/test/{i:04}_mask.png" for i in (0, 1)]
    small = np.zeros((256, 256), dtype=np.uint8)
    small[5:25, 5:25] = 255
    Image.fromarray(small).save(tmp_path / "small.png")
    rows += [f"{data}/test/{i:04}.jpg,{tmp_path}/small.png" for i in (0, 1)]
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        table = (data / f"{split}.csv").read_text().replace(split, f"{data}/{split}")
        (folder / f"{split}.csv").write_text(table)
    (folder / "test.csv").write_text("\n".join(["image,label", *rows]))
    run("sam", folder, tmp_path / "run", "--epochs", 1)
    evaluate.main([str(tmp_path / "run"), "--output", str(tmp_path / "scores")])
    found = table_of(tmp_path / "scores")
    assert [f"{row['image']},{row['mask']}" for row in found] == rows
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert mean(float(row["iou"]) for row in found) == pytest.approx(test["iou"], abs=1e-6)
    assert min(float(row["iou"]) for row in found) < 0.1 < max(float(row["iou"]) for row in found)


def test_names_that_are_no_utf_8_work_to_the_end(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for kind, ending in (("i", ".jpg"), ("m", "_mask.png")):
        (folder / kind).mkdir(parents=True)
        paths = sorted(path for split in data.iterdir() for path in split.glob(f"*{ending}"))
        for n, path in enumerate(2 * paths):
            name = os.fsencode(folder / kind) + b"/b\xe4um%d" % n + os.fsencode(path.suffix)
            content = path.read_bytes() + (bytes(n) if kind == "i" else b"")
            Path(os.fsdecode(name)).write_bytes(content)  # no two images are the same
    options = ["--images", folder / "i", "--masks", folder / "m", "--epochs", 1]
    run("sam", None, tmp_path / "run", *options)
    evaluate.main([str(tmp_path / "run"), "--output", str(tmp_path / "scores")])
    (row,) = table_of(tmp_path / "scores")
    assert "b\\udce4um" in row["image"]
    drawn = [str(tmp_path / "run"), "--output", str(tmp_path / "pictures")]
    pictures.main([*drawn, "--formats", "png"])
    found = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert found == {"predictions", "relations", "epochs", "histograms", "curves"}
    with pytest.raises(SystemExit, match="pictures exists; nothing is written over it"):
        pictures.main([str(tmp_path / "run"), "--output", str(tmp_path / "pictures")])
