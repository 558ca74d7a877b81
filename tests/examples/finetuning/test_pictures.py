"""What the figures of runs show: which files, images, values and names."""

import csv
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import pictures
from parts import figures
from parts.data.batches import MaskedImages, collate
from parts.data.check import read_data
from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.evaluation.curves import draw_curves
from parts.evaluation.drawing import by_label, choose
from parts.evaluation.gallery import Gallery, Picture, extremes
from parts.evaluation.relations import (
    Map,
    draw_histograms,
    draw_maps,
    epochs_to_draw,
    without_padding,
)
from parts.evaluation.scores import evaluate
from parts.runs.trained import load_run


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that a test draws, none of which is written."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: found.append(figure))
    return found


def test_a_run_is_drawn_with_its_label_and_its_scores(trained, tmp_path: Path) -> None:
    run, output = trained("sam", "lora"), tmp_path / "pictures"
    options = ["--labels", "_mine $1", "--formats", "svg"]
    pictures.main([str(run), "--output", str(output), *options])
    names = ("curves", "epochs", "histograms", "predictions", "relations")
    assert sorted(path.name for path in output.iterdir()) == [f"{name}.svg" for name in names]
    text = {name: (output / f"{name}.svg").read_text() for name in names}
    for name in ("curves", "histograms", "predictions", "relations"):
        assert "_mine $1" in text[name], name
    tested = json.loads((run / "result.json").read_text())["test"]
    assert f">mean IoU {100 * tested['iou']:.1f}\N{NO-BREAK SPACE}%<" in text["predictions"]
    assert {">best<", ">worst<"} <= {*re.findall(">best<|>median<|>worst<", text["predictions"])}
    assert all(f">epoch {number}<" in text["epochs"] for number in (1, 2))
    assert all(f"[{unit}]<" in text["curves"] for unit in ("bits", "%"))


def test_files_are_written_in_the_formats_asked_for(tmp_path: Path) -> None:
    with figures.figure_files(tmp_path / "0.5", ["png", "pdf", "svg"], size=(2, 1)) as (_, axes):
        axes[0, 0].imshow(np.eye(9))
        axes[0, 0].set_xlabel("written as text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.5.pdf", "0.5.png", "0.5.svg"]
    svg, pdf = (tmp_path / "0.5.svg").read_text(), (tmp_path / "0.5.pdf").read_bytes()
    assert ">written as text</text>" in svg
    assert "<image" in svg  # pixels stay pixels
    assert b"/Type3" not in pdf
    assert b"/CIDFontType2" in pdf


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([0.5, 0.9, 0.1, 0.7, 0.3], 1, {1: "best", 0: "median", 2: "worst"}),
        (
            [4, 6, 0, 5, 1, 2, 3],
            2,
            dict.fromkeys((1, 3), "best") | {0: "median", 6: "median"} | {4: "worst", 2: "worst"},
        ),
        ([0.2, 0.8], 1, {1: "best", 0: "worst"}),
        ([0.2], 3, {0: "best"}),
        ([1, 1, 1], 1, {0: "best", 1: "median", 2: "worst"}),
    ],
)
def test_the_best_median_and_worst_rows(
    values: Sequence[float], count: int, expected: dict[int, str]
) -> None:
    assert [*extremes(values, count).items()] == [*expected.items()]


def test_rows_are_ranked_by_what_the_first_run_gains() -> None:
    before, first, second = [0.0] * 5, [0.9, 0.5, 0.6, 0.2, 0.7], [0.9, 0.1, 0.7, 0.1, 0.4]
    arguments = Namespace(rows=None, by="difference", each=1)
    found = choose([before, first, second], arguments)
    assert found == {
        1: "best\n+40.0 points",
        3: "median\n+10.0 points",
        2: "worst\n\N{MINUS SIGN}10.0 points",
    }
    arguments.by = "iou"
    assert choose([before, first, second], arguments) == {0: "best", 2: "median", 3: "worst"}
    arguments.rows = [4, 1]
    assert choose([before, first, second], arguments) == {4: "row 4", 1: "row 1"}


@pytest.mark.parametrize("size", [(150, 256), (90, 30), (64, 64), (1000, 10)])
@pytest.mark.parametrize("keep_aspect", [True, False])
def test_padding_is_cut_from_relation_maps(size: tuple[int, int], keep_aspect: bool) -> None:
    frame, values = Frame(256, keep_aspect), torch.arange(256.0).view(16, 16)
    found, cell = without_padding(values, frame, *size)
    seen = frame.valid(*size).unfold(0, 16, 16).unfold(1, 16, 16).flatten(2).any(-1)
    torch.testing.assert_close(found, values[seen].view(len(found), -1), rtol=0, atol=0)
    for places, pixels, side in zip(found.shape, cell, size, strict=True):
        # The places cover the image, and the last one has some of it. A scaled side is rounded.
        assert places * pixels > 0.999 * side
        assert (places - 1) * pixels < side


def test_maps_are_drawn_without_padding_and_within_their_quantiles(drawn, tmp_path: Path) -> None:
    values = torch.linspace(-3, 1, 160).view(10, 16)
    truth = torch.zeros(150, 256, dtype=torch.bool)
    truth[40:90, 100:200] = True
    box = Prompts(torch.tensor([100.0, 40.0, 200.0, 90.0]))
    picture = Picture(np.zeros((150, 256, 3), dtype=np.uint8), truth, box, "best\nname")
    columns = {"student": {7: Map(values, (16.0, 16.0))}}
    draw_maps({7: picture}, columns, tmp_path / "relations", ["png"])
    image, maps, bar = drawn[0].axes
    assert (image.get_title(), maps.get_title()) == ("image and prompt", "student")
    assert image.get_ylabel() == "best\nname"
    assert bar.get_ylabel().split() == ["relation,", "2", "%", "to", "98", "%", "quantile"]
    shown = maps.images[-1]
    assert shown.get_array().shape == (10, 16)
    assert shown.get_clim() == pytest.approx(np.quantile(values, [0.02, 0.98]))
    assert (maps.get_xlim(), maps.get_ylim()) == ((0, 256), (150, 0))


def test_histograms_count_every_place(drawn, tmp_path: Path) -> None:
    parts = [{row: Map(torch.rand(3, 4), (1.0, 1.0)) for row in (0, 5)} for _ in range(2)]
    draw_histograms({1: parts, 4: parts}, "mine", tmp_path / "histograms", ["png"])
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["epoch 1", "epoch 4"]
    assert drawn[0].axes[0].get_ylabel() == "places of\n2 images [%]"
    for line in drawn[0].axes[0].patches:
        heights = line.get_xy()[1:-1:2, 1]
        assert heights.sum() == pytest.approx(100)


def test_epochs_are_those_that_have_a_checkpoint(tmp_path: Path) -> None:
    for epoch in (10, 20, 30, 40, 50, 60, 1000):
        (tmp_path / f"epoch-{epoch:03d}").mkdir()
    (tmp_path / "epoch-1010.abcdefgh.unfinished").mkdir()
    assert epochs_to_draw(tmp_path) == [10, 30, 40, 50, 1000]
    for epoch in (20, 30, 40, 50, 60, 1000):
        (tmp_path / f"epoch-{epoch:03d}").rmdir()
    assert epochs_to_draw(tmp_path) == [10]


def table(run: Path, steps: Sequence[int], ious: Sequence[float]) -> Path:
    run.mkdir()
    for name, column in (("training", "structure"), ("validation", "iou")):
        with (run / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["step", column], *zip(steps, ious, strict=True)])
    return run


def test_a_band_is_the_standard_error_over_runs(drawn, tmp_path: Path) -> None:
    seeds = {0: [0.1, 0.2, 0.9], 1: [0.3, 0.5, 0.6], 2: [0.2, 0.2, 0.6]}
    runs = [table(tmp_path / str(seed), [4, 8, 12], values) for seed, values in seeds.items()]
    shorter = table(tmp_path / "3", [8, 12, 16], [0.7, 0.8, 0.9])
    alone = table(tmp_path / "alone", [4, 8], [0.4, 0.45])
    draw_curves({"mine": [*runs, shorter], "other": [alone]}, tmp_path / "curves", ["png"])
    loss, iou = drawn[0].axes
    assert iou.get_ylabel() == "validation\nIoU [%]"
    assert iou.get_xlabel() == loss.get_xlabel() == "training step"
    mine, other = iou.lines
    assert mine.get_xdata().tolist() == [8, 12]  # what all runs have
    every = [[0.2, 0.5, 0.2, 0.7], [0.9, 0.6, 0.6, 0.8]]
    assert mine.get_ydata() == pytest.approx([100 * mean(values) for values in every])
    assert other.get_ydata() == pytest.approx([40, 45])
    (band,) = iou.collections
    bounds = {x: [y for at, y in band.get_paths()[0].vertices if at == x] for x in (8, 12)}
    for ys, values in zip(bounds.values(), every, strict=True):
        error = 100 * stdev(values) / len(values) ** 0.5
        assert min(ys) == pytest.approx(100 * mean(values) - error)
        assert max(ys) == pytest.approx(100 * mean(values) + error)
    assert loss.lines[0].get_ydata() == pytest.approx([mean(values) for values in every])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["mine (4 runs)", "other"]
    assert "± one standard error" in legend.get_title().get_text()


def test_runs_are_named_by_their_folders_or_labels(tmp_path: Path) -> None:
    a, b, other = tmp_path / "x" / "a", tmp_path / "x" / "b", tmp_path / "y" / "a"
    assert by_label([a, b], None) == {"a": [a], "b": [b]}
    assert by_label([a, other], None) == {str(a): [a], str(other): [other]}
    assert by_label([a, b, other], ["one", "two", "one"]) == {"one": [a, other], "two": [b]}


def test_points_are_those_of_the_evaluation(trained) -> None:
    """They hang on the batch, so that images have to come in the same ones."""
    model, options = load_run(trained("sam", "lora"))
    rows = read_data(options)[0]["train"]
    options.eval_prompts, options.eval_points = "points", 3
    loader = DataLoader(MaskedImages(rows, model.frame), options.batch_size, collate_fn=collate)
    expected = evaluate(model, loader, "points", 3)["iou"]
    gallery = Gallery(rows, options)
    assert mean(gallery.ious(model, "student")) == pytest.approx(expected)
    chosen = {3: "row 3", 0: "row 0"}
    found = gallery.pictures(model, chosen)
    assert [*found] == [3, 0]
    for row, picture in found.items():
        assert picture.name == f"row {row}\n{rows[row].image.name}"
        x, y = picture.prompt.points.round().long().T
        inside = picture.truth[y, x]
        assert inside.tolist() == (picture.prompt.labels == 1).tolist()
        mask = gallery.masks(model, {row: ""})[row]
        assert mask.shape == picture.truth.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "one", "two"], "--labels must name each of the 1 runs, got 2 names"),
        (["--formats", "gif"], "--formats: invalid choice: 'gif'"),
        (["--each", "0"], "--each: must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        pictures.main(["run", "--output", "pictures", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (1, ["--by", "difference"], "--by difference needs runs of two labels, got a"),
        (2, ["--by", "difference", "--labels", "a", "a"], "needs runs of two labels, got a$"),
        (1, ["--rows", "0", "2"], "--rows must be from 0 to 1, got "),
        (2, ["--labels", "mine", "mine"], "labelled mine must have steps in common, they have no"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    runs: int, options: list[str], message: str, trained, tmp_path: Path
) -> None:
    given = [shutil.copytree(trained("sam", "lora"), tmp_path / name) for name in "ab"[:runs]]
    (given[-1] / "training.csv").write_text("step,structure\n99,1\n")
    with pytest.raises(SystemExit, match=message) as found:
        pictures.main([*map(str, given), "--output", str(tmp_path / "pictures"), *options])
    assert str(found.value).startswith("error: ")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "pictures").exists()


def test_a_run_given_twice_is_no_seed(trained, tmp_path: Path) -> None:
    run = trained("sam", "lora")
    (tmp_path / "link").symlink_to(run)
    twice = [str(run), str(tmp_path / "link")]
    with pytest.raises(SystemExit, match="each run must be given once"):
        pictures.main([*twice, "--output", str(tmp_path / "pictures"), "--labels", "a", "a"])
