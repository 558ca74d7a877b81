"""Masks for new prompts: checked before anything is written, and never in place of a file."""

import csv
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from finetuning_runs import FAST_METHODS
from hypothesis import given
from PIL import Image

import predict
from parts.data.prompts import Prompts
from parts.evaluation.prediction import Prompt, mask_names, what_is_wrong
from parts.runs.trained import load_run

BOXES, POINTS = "image,x0,y0,x1,y1", "image,x,y,label"


@pytest.fixture(scope="module")
def image(data: Path) -> np.ndarray:
    # A copy, as PyTorch warns of arrays that it must not write to.
    return np.array(Image.open(data / "test" / "0000.jpg"))


def write_table(path: Path, header: str, rows: list[list[object]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


@pytest.mark.parametrize("family", ["sam", "transformers-sam2"])
def test_predict(family: str, trained, image: np.ndarray, tmp_path: Path, capsys) -> None:
    run = trained(family, FAST_METHODS[family])
    # A few steps from random weights end with masks that are empty; there are none to begin with.
    epoch = None if family == "sam" else 0
    wide = np.concatenate([image, image[:, ::-1]], axis=1)
    (tmp_path / "sub").mkdir()
    Image.fromarray(wide).save(tmp_path / "sub" / "wide.png")
    boxes = [[60, 50, 180, 190], [300, 20, 480, 200]]
    table = write_table(tmp_path / "boxes.csv", BOXES, [["sub/wide.png", *box] for box in boxes])
    asked = [] if epoch is None else ["--epoch", str(epoch)]
    outputs = ["--output", str(tmp_path / "masks"), "--overlays", str(tmp_path / "overlays")]
    predict.main([str(run), table, *outputs, *asked])
    assert f"2 masks: {tmp_path / 'masks'}" in capsys.readouterr().out

    student, _ = load_run(run, epoch)
    for name, box in zip(("wide.png", "wide-2.png"), boxes, strict=True):
        mask = np.asarray(Image.open(tmp_path / "masks" / "sub" / name))
        assert mask.shape == wide.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        scaled = student.frame.boxes(torch.tensor([box]).float(), *mask.shape)
        with torch.no_grad():
            logits = student(student.frame.image(wide)[None], Prompts(scaled))[0]
        expected = student.frame.restore(logits, *mask.shape).numpy() > 0
        assert 0.01 < expected.mean() < 0.99
        assert (mask > 0).mean() == pytest.approx(expected.mean(), abs=1e-3)
        assert ((mask > 0) == expected).mean() > 0.999

    # The overlay has the image, half of it blue where a mask is, and a frame where the box is.
    drawn = np.asarray(Image.open(tmp_path / "overlays" / "sub" / "wide.png")).astype(int)
    masks = [np.asarray(Image.open(path)) > 0 for path in (tmp_path / "masks" / "sub").iterdir()]
    on = np.any(masks, axis=0)
    expected = np.where(on[..., None], (wide + np.array([0, 114, 178])) / 2, wide)
    frames = np.zeros_like(on)
    for x0, y0, x1, y1 in boxes:
        frames[y0 - 2 : y1 + 3, x0 - 2 : x1 + 3] = True
        frames[y0 + 3 : y1 - 2, x0 + 3 : x1 - 2] = False
    assert np.abs(drawn - expected)[~frames].max() <= 1
    assert (drawn[60:180, 60] == (240, 228, 66)).all()

    points = [["sub/wide.png", 120, 120, 1], ["sub/wide.png", 20, 20, 0]]
    table = write_table(tmp_path / "points.csv", POINTS, points)
    outputs = ["--output", str(tmp_path / "of points"), "--overlays", str(tmp_path / "points")]
    predict.main([str(run), table, *outputs])
    for folder in ("of points", "points"):
        assert [path.name for path in (tmp_path / folder).rglob("*.png")] == ["wide.png"]


def test_one_box_for_a_folder(trained, image: np.ndarray, tmp_path: Path, capsys) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.JPG"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "scan").write_text("no ending")
    (tmp_path / "images" / "._a.png").write_text("of a Mac")
    asked = [str(trained("sam", "lora")), str(tmp_path / "images")]
    box = ["--box", "60", "50", "180", "190"]
    predict.main([*asked, *box, "--output", str(tmp_path / "masks")])
    assert f"2 of 4 in {tmp_path / 'images'} have no image's name" in capsys.readouterr().out
    table = write_table(tmp_path / "t.csv", BOXES, [["images/a.png", 60, 50, 180, 190]])
    predict.main([asked[0], table, "--output", str(tmp_path / "one")])
    found = {path.name: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    assert found.keys() == {"a.png", "b.png"}
    assert found["a.png"] == (tmp_path / "one" / "images" / "a.png").read_bytes()
    for arguments, message in (
        (asked, "--box must be given for the images of a folder"),
        ([asked[0], table, *box], "--box is for all images of a folder, got the table"),
        ([asked[0], str(tmp_path / "masks" / ".."), *box], "must have images, got none"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main([*arguments, "--output", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_masks_replace_nothing(trained, image: np.ndarray, tmp_path: Path) -> None:
    run = str(trained("sam", "lora"))
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "b.jpg"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    absolute = str(tmp_path / "images" / "a.png")

    def ask(names: list[str], folder: str, output: str, *others: str) -> None:
        table = write_table(tmp_path / "t.csv", POINTS, [[name, 99, 99, 1] for name in names])
        options = ["--images", str(tmp_path / folder), "--output", str(tmp_path / output)]
        predict.main([run, table, *options, *others])

    ask([absolute], "images", "absolute")
    (tmp_path / "elsewhere").mkdir()
    ask(["../images/a.png"], "elsewhere", "above")
    for output in ("absolute", "above"):
        assert [path.name for path in (tmp_path / output).rglob("*.*")] == ["a.png"]
    with pytest.raises(SystemExit, match="images exists; nothing is written over it"):
        ask(["a.png"], "images", "images")
    with pytest.raises(SystemExit, match="above exists; nothing is written over it"):
        ask(["a.png"], "images", "new", "--overlays", str(tmp_path / "above"))
    with pytest.raises(SystemExit, match="must be two folders, neither inside the other"):
        ask(["a.png"], "images", "new", "--overlays", str(tmp_path / "new" / "overlays"))
    with pytest.raises(SystemExit, match=r"b.jpg and .*b.png would both have the mask b.png"):
        ask(["b.png", "b.jpg"], "images", "twice")
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_two_names_of_one_folder_are_refused(trained, image: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(image).save(tmp_path / "a.png")
    table = write_table(tmp_path / "p.csv", BOXES, [["a.png", 60, 50, 180, 190]])
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    for output, overlays in (("x", "sub/../x"), ("sub/x", "link/x"), ("link/x/y", "sub/x")):
        places = ["--output", f"{tmp_path}/{output}", "--overlays", f"{tmp_path}/{overlays}"]
        with pytest.raises(SystemExit, match="must be two folders, neither inside the other"):
            predict.main([str(trained("sam", "lora")), table, *places])
    assert not any((tmp_path / "sub").iterdir())


def test_the_mask_of_a_link_has_the_name_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "real.png").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to("../real.png")
    box = [Prompt("", [0, 0, 1, 1])]
    for cell in ("link.png", "../images/link.png"):
        image = tmp_path / "images" / cell
        assert mask_names({image: box}, tmp_path / "images") == {image: [Path("link.png")]}


def test_a_path_that_does_not_exist_is_no_table(trained, tmp_path: Path) -> None:
    box = ["--box", "1", "1", "9", "9", "--output", str(tmp_path / "masks")]
    with pytest.raises(SystemExit, match=r"nope: No such file or directory \(does it exist\?\)"):
        predict.main([str(trained("sam", "lora")), str(tmp_path / "nope"), *box])


WRONG = {
    "reversed": (BOXES, [200, 190, 10, 10], "x0 must be below x1, got 200 and 10, for a.png"),
    "width and height": (BOXES, [50, 200, 90, 40], "y0 must be below y1, got 200 and 40"),
    "no area": (BOXES, [50, 50, 50, 90], "x0 must be below x1, got 50 and 50"),
    "outside": (BOXES, [0, 0, 99, 300], "y1 must be from 0 to 256 in an image of 256 x 256"),
    "negative": (BOXES, [-1, 0, 99, 99], "x0 must be from 0 to 256 in an image of 256 x 256"),
    "nan": (BOXES, ["nan", 10, 200, 200], "x0 must be a finite number, got 'nan'"),
    "inf": (POINTS, [10, "inf", 1], "y must be a finite number, got 'inf'"),
    "empty": (POINTS, [10, "", 1], "y must be a finite number, got ''"),
    "a word": (POINTS, [10, 10, "yes"], "label must be a finite number, got 'yes'"),
    "decimal comma": (POINTS, ["10,5", 10, 1], "x must be a finite number, got '10,5'"),
    "missing cells": (POINTS, [10], "2 cells, but 4 in the first line"),
    "decimal commas": (BOXES, [10, 5, 20, 7, 100, 5, 30, 2], "9 cells, but 5 in the first line"),
    "underscore": (POINTS, ["1_0", 10, 1], "x must be a finite number, got '1_0'"),
    "no image": (POINTS, [10, 10, 1, ""], "no image in the row"),
    "a folder": (POINTS, [10, 10, 1, "."], "cannot be read: Is a directory"),
    "NUL": (POINTS, [10, 10, 1, "a\0.png"], "a cell with a line break or a NUL character"),
    "boxes and points": (
        f"{BOXES},x,y,label",
        [],
        "must have columns image and either x0,y0,x1,y1 or",
    ),
    "half a label": (POINTS, [10, 10, 0.5], "label must be 1 on the object or 0 beside it"),
    "label 2": (POINTS, [10, 10, 2], "label must be 1 on the object or 0 beside it, got 2"),
    "label -1": (POINTS, [10, 10, -1], "label must be 1 on the object or 0 beside it, got -1"),
    "point outside": (POINTS, [10, 256.5, 1], "y must be from 0 to 256 in an image"),
    "other columns": (
        "image,x,y",
        [10, 20],
        "must have columns image and either x0,y0,x1,y1 or x,y",
    ),
    "no image column": ("file,x,y,label", [10, 20, 1], "no column image in its first line"),
}
if sys.version_info < (3, 11):
    del WRONG["NUL"]  # which csv cannot write there


@pytest.mark.parametrize("case", WRONG)
def test_wrong_prompts(case: str, trained, image: np.ndarray, tmp_path: Path) -> None:
    header, (*cells,), message = WRONG[case]
    Image.fromarray(image).save(tmp_path / "a.png")
    right = {BOXES: [60, 50, 180, 190], POINTS: [60, 60, 1]}.get(header, cells)
    if case == "boxes and points":
        right = cells = [60, 50, 180, 190, 60, 60, 1]
    name = cells.pop() if len(cells) == 4 and header == POINTS else "a.png"
    rows = [["a.png", *right], [name, *cells]]
    table = write_table(tmp_path / "p.csv", header, rows)
    with pytest.raises(SystemExit) as exit_info:
        predict.main([str(trained("sam", "lora")), table, "--output", str(tmp_path / "masks")])
    said = str(exit_info.value)
    assert message in said
    assert "p.csv" in said
    if "column" not in message:
        assert "p.csv line 3: " in said
    assert not (tmp_path / "masks").exists()


def test_images_of_fewer_than_16_bits(trained, image: np.ndarray, tmp_path: Path) -> None:
    """As the run was trained on 8 bits, only `--image-range` can say what the values mean."""
    grey = image[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / "deep.png")
    run, box = str(trained("sam", "lora")), [60, 50, 180, 190]

    def ask(name: str, *options: str) -> bytes:
        table = write_table(tmp_path / "t.csv", BOXES, [[f" {name} ", *box]])
        predict.main([run, table, "--output", str(tmp_path / f"of {name}"), *options])
        return (tmp_path / f"of {name}" / name).read_bytes()

    with pytest.raises(SystemExit, match=r"has it fewer bits.*--image-range 0 4095"):
        ask("deep.png")
    assert ask("deep.png", "--image-range", "0", "4080") == ask("a.png")


def test_all_that_is_wrong_with_prompts_at_once(trained, image: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    rows = [["a.png", 9, 9, 2]] * 30
    rows += [["absent.png", 1, 1, 1], ["broken.png", 1, 1, 1], ["a.png", 999, 1, 1]]
    table = write_table(tmp_path / "p.csv", POINTS, rows)
    with pytest.raises(SystemExit) as exit_info:
        predict.main([str(trained("sam", "lora")), table, "--output", str(tmp_path / "masks")])
    lines = str(exit_info.value).splitlines()
    assert lines[0] == "error: The prompts have 33 problems:"
    assert sum("label must be 1" in line for line in lines) == 10
    assert "... and 20 more: a label other than 0 and 1" in lines
    for words in ("p.csv line 32: image", "is missing", "p.csv line 33", "cannot be read"):
        assert any(words in line for line in lines)
    assert "p.csv line 34: x must be from 0 to 256" in "\n".join(lines)


coordinates = st.floats(-10, 60, allow_nan=False)


@given(st.tuples(*[coordinates] * 4))
def test_boxes_are_right_if_in_order_and_inside(box: tuple[float, ...]) -> None:
    x0, y0, x1, y1 = box
    right = 0 <= x0 < x1 <= 50 and 0 <= y0 < y1 <= 40
    assert (what_is_wrong([*box], height=40, width=50) is None) == right


@given(coordinates, coordinates, st.sampled_from([0, 1, 2, -1, 0.5]))
def test_points_are_right_if_inside_and_labelled(x: float, y: float, label: float) -> None:
    right = 0 <= x <= 50 and 0 <= y <= 40 and label in (0, 1)
    assert (what_is_wrong([x, y, label], height=40, width=50) is None) == right
