"""Data sets in COCO's format: the masks are those that are meant, and what is wrong is named."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finetuning_runs import run
from PIL import Image

import check_data
import evaluate
from parts.data.coco import read_coco
from parts.data.reading import read_mask
from parts.data.tables import Splits

COUNT = 12
HEIGHT, WIDTH = 48, 64


def rectangle(number: int) -> np.ndarray:
    """The first object of an image."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:30, 10 + number : 40] = True
    return mask


def stripe() -> np.ndarray:
    """The second object of an image."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[35:40, 5:60] = True
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of runs down the columns, those of zeros first."""
    values = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(values[1:] != values[:-1])
    return np.diff([0, *changes, mask.size]).tolist()


def instances() -> dict:
    """A file of twelve images with two objects each, one without any, and a crowd."""
    images, annotations = [], []
    for number in range(COUNT + 1):
        shape = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": 100 + number, "file_name": f"{number:02}.png", **shape})
    for number in range(COUNT):
        left = 10 + number
        polygon = [[left, 8, 40, 8, 40, 30, left, 30]]
        code = {"size": [HEIGHT, WIDTH], "counts": run_lengths(stripe())}
        common = {"image_id": 100 + number, "category_id": 1, "iscrowd": 0}
        annotations.append({"id": 2 * number + 1, "segmentation": polygon, **common})
        annotations.append({"id": 2 * number + 2, "segmentation": code, **common})
    crowd = {"id": 99, "image_id": 100, "category_id": 1, "iscrowd": 1}
    annotations.append({**crowd, "segmentation": code})
    categories = [{"id": 1, "name": "leaf"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and their objects in `instances.json`."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    for number in range(COUNT + 1):
        pixels = 40 + 9 * number + 60 * rectangle(number) + 90 * stripe()
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number:02}.png")
    (folder / "instances.json").write_text(json.dumps(instances()))
    return folder


def names(splits: Splits) -> dict[str, set[str]]:
    return {split: {row.image.name for row in rows} for split, rows in splits.items()}


def test_rows_are_objects(folder: Path, capsys) -> None:
    splits = read_coco(folder / "instances.json", folder / "images")
    assert capsys.readouterr().out == "Warning: crowds are left out, 1 in all.\n"
    rows = [row for members in splits.values() for row in members]
    assert len(rows) == 2 * COUNT
    for row in rows:
        number = int(row.image.stem)
        identity = int(re.search(r"annotation (\d+)$", row.source)[1])
        assert (identity - 1) // 2 == number
        expected = rectangle(number) if identity % 2 else stripe()
        mask = read_mask(row.label)
        np.testing.assert_array_equal(mask.object, expected)
        assert mask.known.all()


def test_images_are_split_by_their_names(folder: Path, tmp_path: Path) -> None:
    splits = names(read_coco(folder / "instances.json", folder / "images"))
    assert [len(splits[split]) for split in ("train", "val", "test")] == [10, 1, 1]
    assert set.union(*splits.values()) == {f"{number:02}.png" for number in range(COUNT)}
    turned = instances()
    turned["images"].reverse()
    turned["annotations"].reverse()
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    assert names(read_coco(tmp_path / "turned.json", folder / "images")) == splits


def changed(change: Callable[[dict], object]) -> str:
    content = copy.deepcopy(instances())
    change(content)
    return json.dumps(content)


def first(content: dict) -> dict:
    return content["annotations"][0]


def code_of(counts: list[int] | str) -> dict:
    return {"size": [HEIGHT, WIDTH], "counts": counts}


WRONG = {
    "no JSON": ("{", "must be a file of COCO's instances, got .*JSONDecodeError"),
    "a list": ("[]", "must be a file of COCO's instances, got .*AssertionError"),
    "no file name": (
        changed(lambda c: c["images"][0].pop("file_name")),
        "must be a file of COCO's instances, got .*KeyError, 'file_name'",
    ),
    "an unknown image": (
        changed(lambda c: first(c).update(image_id=7)),
        "must be a file of COCO's instances, got .*KeyError, 7",
    ),
    "no segmentation": (
        changed(lambda c: first(c).pop("segmentation")),
        "annotation 1 of 00.png: an annotation whose segmentation cannot be read",
    ),
    "a line": (
        changed(lambda c: first(c).update(segmentation=[[1, 1, 9, 9]])),
        r"annotation 1 .*: a polygon must have at least 6 numbers, .* got \[\[1, 1, 9, 9\]\]",
    ),
    "no polygon": (
        changed(lambda c: first(c).update(segmentation=[])),
        r"annotation 1 .*: a polygon must have at least 6 numbers, .* got \[\]",
    ),
    "half a point": (
        changed(lambda c: first(c).update(segmentation=[[1, 1, 9, 1, 9, 9, 1]])),
        "annotation 1 .*: a polygon must have .* two for each point",
    ),
    "a number far away": (
        changed(lambda c: first(c).update(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]])),
        "annotation 1 .*: a polygon must have numbers of at most 128, got",
    ),
    "no number": (
        changed(lambda c: first(c).update(segmentation=[[5, 5, float("nan"), 5, 9, 9]])),
        "annotation 1 .*: a polygon must have numbers of at most 128, got",
    ),
    "a code that is too short": (
        changed(lambda c: first(c).update(segmentation=code_of([100, 100]))),
        "annotation 1 .*: a run-length code must be of 3072 pixels",
    ),
    "a code that is too long": (
        changed(lambda c: first(c).update(segmentation=code_of([100, 100, 200000]))),
        "annotation 1 .*: an annotation whose segmentation cannot be read",
    ),
    "an empty code": (
        changed(lambda c: first(c).update(segmentation=code_of(""))),
        "annotation 1 .*: an annotation whose segmentation cannot be read",
    ),
    "an image twice": (
        changed(lambda c: c["images"][1].update(id=100)),
        "must be a file of COCO's instances, got .*two images have the id 100",
    ),
    "an object twice": (
        changed(lambda c: c["annotations"][1].update(id=1)),
        "must be a file of COCO's instances, got .*two annotations have the id 1",
    ),
    "a crowd in words": (
        changed(lambda c: first(c).update(iscrowd="0")),
        "annotation 1 of 00.png: an annotation whose iscrowd is neither 0 nor 1: '0'",
    ),
    "a number for a name": (
        changed(lambda c: c["images"][0].update(file_name=1)),
        "must be a file of COCO's instances, got .*TypeError",
    ),
    "nine images": (
        changed(lambda c: c.update(annotations=c["annotations"][:18])),
        "10 images with objects are needed, 9 were found",
    ),
    "an object beside its image": (
        changed(lambda c: first(c).update(segmentation=[[90, 90, 99, 90, 99, 99]])),
        "mask instances.json annotation 1 is empty",
    ),
    "an image that is not there": (
        changed(lambda c: c["images"][0].update(file_name="x.png")),
        "image .*x.png is missing",
    ),
    "another size": (
        changed(lambda c: c["images"][0].update(height=50)),
        "00.png is 64 x 48 and its mask instances.json annotation 1 64 x 50",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, folder: Path, tmp_path: Path) -> None:
    content, message = WRONG[case]
    (tmp_path / "instances.json").write_text(content)
    asked = ["--images", str(folder / "images"), "--coco", str(tmp_path / "instances.json")]
    with pytest.raises(SystemExit, match=message):
        check_data.main(asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--foreground", "1"], "--foreground and --ignore are for --data and --masks"),
        (["--test-table", "x.csv"], "--test-table is for --data, got x.csv; leave it out"),
    ],
)
def test_options_without_use(options: list[str], message: str, folder: Path) -> None:
    asked = ["--images", str(folder / "images"), "--coco", str(folder / "instances.json")]
    with pytest.raises(SystemExit, match=message):
        check_data.main([*asked, *options])
    with pytest.raises(SystemExit, match="--coco must be a file, got "):
        check_data.main([*asked[:2], "--coco", str(folder)])


@pytest.mark.slow
def test_a_run_on_objects(folder: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved.json"
    moved.write_bytes((folder / "instances.json").read_bytes())
    data = ["--images", folder / "images", "--coco", folder / "instances.json"]
    run("sam", None, tmp_path / "run", *data, "--epochs", 1, "--distiller", "none")
    assert "masks: 24 of objects of COCO" in capsys.readouterr().out
    command = [str(tmp_path / "run"), "--coco", str(moved), "--output", str(tmp_path / "scores")]
    evaluate.main(command)
    table = (tmp_path / "scores" / "images.csv").read_text()
    assert len(re.findall(r"instances.json annotation \d+|moved.json annotation \d+", table)) == 2
    moved.write_text(changed(lambda c: first(c).update(segmentation=[[9, 9, 30, 9, 30, 30]])))
    with pytest.raises(SystemExit, match="are not those of the run"):
        evaluate.main([str(tmp_path / "run"), "--coco", str(moved)])
