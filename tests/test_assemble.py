import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

import assemble
from assemble import RECIPES, SOURCES, SPLITS, Row

PENN, COCO, ROADS = "gmguarino/PennFudan", "zzowenzz/COCO_Tiny", "aschneuw/road-segmentation-unet"
BLOCK = np.s_[100:300, 50:450]


@pytest.fixture
def clones(tmp_path, monkeypatch):
    """Clones of three repositories, of a few files, and the manifests of what is made of them."""
    folder = tmp_path / "clones"
    pixels = np.random.default_rng(0).integers(0, 255, (450, 600, 3), dtype=np.uint8)
    values = np.zeros((450, 600), np.uint8)
    values[BLOCK] = 2
    block = [50, 100, 449, 100, 449, 299, 50, 299]
    annotations = [{"id": 7, "image_id": 3, "segmentation": [block], "iscrowd": 0}]
    images = [{"id": 3, "width": 600, "height": 450}]
    for name, content in {
        "gmguarino+PennFudan/picture.png": pixels,
        "gmguarino+PennFudan/values.png": values,
        "COCO_Tiny/picture.png": pixels,
        "COCO_Tiny/instances.json": {"images": images, "annotations": annotations},
        "road-segmentation-unet/picture.png": pixels,
        "road-segmentation-unet/a_1.png": np.where(np.arange(600) < 200, values, 0) * 127,
        "road-segmentation-unet/a_2.png": np.where(np.arange(600) < 200, 0, values) * 127,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            path.write_text(json.dumps(content))
        else:
            Image.fromarray(content).save(path)
    monkeypatch.setattr(assemble, "MANIFEST", tmp_path / "manifest")
    penn = Row("train", "p.jpg", "?", PENN, "picture.png", "values.png", "p.png", "?", "2")
    roads = Row("test", "r.jpg", "?", ROADS, "picture.png", "a_*.png", "r.png", "?", "")
    write("general", penn)
    write("roads_epfl", roads)
    with (assemble.MANIFEST / "general.csv").open("a") as file:
        print(f"val,c.jpg,?,{COCO},,instances.json,c.png,?,7", file=file)
    return folder


def write(name: str, *rows: Row) -> None:
    assemble.MANIFEST.mkdir(exist_ok=True)
    lines = [",".join(row) for row in (Row._fields, *rows)]
    (assemble.MANIFEST / f"{name}.csv").write_text("\n".join(lines) + "\n")


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["assemble.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        assemble.main()
    return int(ended.value.code), *capsys.readouterr()


@pytest.fixture
def built(clones, tmp_path, monkeypatch, capsys):
    """A folder built of them, and manifests that hold its digests."""
    only = ["--only", "general", "roads_epfl"]
    code, out, _ = run(
        monkeypatch, capsys, "--clones", clones, "--output", tmp_path / "built", *only
    )
    assert code == 1  # the digests were not known
    assert "general: 0 of 2 masks are those of the manifest" in out
    for name in only[1:]:
        folder = tmp_path / "built" / name
        rows = [
            row._replace(
                image_sha256=assemble.digest(folder / "images" / row.image)[:16],
                mask_sha256=assemble.digest(folder / "masks" / row.mask)[:16],
            )
            for row in assemble.read_manifest(name)
        ]
        write(name, *rows)
    return tmp_path / "built"


def test_folders_have_pictures_masks_and_splits(built, monkeypatch, capsys):
    train = (built / "general" / "train.csv").read_text()
    assert train == "image,label\nimages/p.jpg,masks/p.png\n"
    assert (built / "roads_epfl" / "val.csv").read_text() == "image,label\n"
    for path, side in (
        (built / "general" / "images" / "p.jpg", 256),
        (built / "general" / "images" / "c.jpg", 256),
        (built / "roads_epfl" / "images" / "r.jpg", 320),
    ):
        mask_path = path.parents[1] / "masks" / f"{path.stem}.png"
        with Image.open(path) as image, Image.open(mask_path) as mask:
            assert image.size == mask.size == (side, side * 3 // 4)
            assert (image.format, image.mode, mask.mode) == ("JPEG", "RGB", "1")
            pixels = np.asarray(mask)
        found = np.argwhere(pixels)
        expected = np.array([[100, 50], [299, 449]]) * side / 600
        assert np.abs([found.min(0), found.max(0)] - expected).max() <= 1
        assert len(found) == pytest.approx(200 * 400 * (side / 600) ** 2, rel=0.02)
    code, out, _ = run(monkeypatch, capsys, "--check", built, "--only", "general", "roads_epfl")
    assert (code, len(out.splitlines())) == (0, 4)


def test_what_differs_from_the_manifest_is_said(built, monkeypatch, capsys):
    general = built / "general"
    (general / "images" / "p.jpg").write_bytes(b"other")
    (general / "masks" / "c.png").rename(general / "masks" / "d.png")
    (general / "test.csv").write_text("image,label\nimages/p.jpg,masks/p.png\n")
    (general / "val.csv").unlink()
    code, out, _ = run(monkeypatch, capsys, "--check", built, "--only", "general", "roads_epfl")
    assert code == 1
    for line in (
        "general: 1 of 2 images are those of the manifest",
        "general: 1 images changed: images/p.jpg",
        "general: 1 masks missing: masks/c.png",
        "general: 1 masks not known: masks/d.png",
        "general: test.csv lacks 0 lines, has 1 others, or has another order",
        "general: val.csv is missing",
        "roads_epfl: 1 of 1 masks are those of the manifest",
    ):
        assert f"{line}\n" in out
    general.rename(built / "other")
    code, out, _ = run(monkeypatch, capsys, "--check", built, "--only", "general")
    assert (code, out) == (1, "general: missing\n")


def test_errors_are_one_line_and_leave_nothing(clones, built, tmp_path, monkeypatch, capsys):
    make = ["--only", "general", "--clones", clones, "--output"]
    code, _, message = run(monkeypatch, capsys, *make, built)
    assert (code, message.count("\n")) == (2, 1)
    assert "nothing is written over it" in message
    (clones / "gmguarino+PennFudan" / "values.png").unlink()
    code, _, message = run(monkeypatch, capsys, *make, tmp_path / "new")
    assert (code, message.count("\n")) == (2, 1)
    assert f"is {clones / 'gmguarino+PennFudan'} at {SOURCES[PENN].commit}?" in message
    (clones / "COCO_Tiny").rename(clones / "other")
    code, _, message = run(monkeypatch, capsys, *make, tmp_path / "new")
    assert (code, message.count("\n")) == (2, 1)
    assert f"no clone of https://github.com/{COCO} at {SOURCES[COCO].commit}" in message
    assert not (tmp_path / "new").exists()


def test_objects_of_files_of_matlab_and_components(tmp_path):
    values = np.array([[4, 4, 0], [0, 0, 4]], np.uint8)
    Image.fromarray(values).save(tmp_path / "values.png")
    annotators = np.empty((1, 2), object)
    annotators[0, :] = [{"Segmentation": values}, {"Segmentation": values.T}]
    savemat(tmp_path / "classes.mat", {"groundtruth": values})
    savemat(tmp_path / "segments.mat", {"groundTruth": annotators})
    savemat(tmp_path / "cracks.mat", {"groundTruth": {"Segmentation": values}})
    expected = values == 4
    last = [[False, False, False], [False, False, True]]
    assert np.array_equal(assemble.component(tmp_path / "values.png", "4/2"), last)
    assert np.array_equal(assemble.pixel_labels(tmp_path / "classes.mat", "4"), expected)
    assert np.array_equal(assemble.segment(tmp_path / "segments.mat", "1/4"), expected.T)
    assert np.array_equal(assemble.crack(tmp_path / "cracks.mat", "4"), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_manifests_are_whole(name):
    rows = assemble.read_manifest(name)
    assert len({row.mask for row in rows}) == len(rows)
    assert {row.split for row in rows} == set(SPLITS)
    assert {row.repository for row in rows} <= SOURCES.keys()
    assert all(re.fullmatch("[0-9a-f]{16}", x) for row in rows for x in (row[2], row[7]))
    of_image = {row.image: row[:5] for row in rows}  # one split, digest and source
    assert all(of_image[row.image] == row[:5] for row in rows)
