"""Data sets as a model sees them, and everything that can be wrong with their files."""

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import check_data
from parts.data.batches import MaskedImages, collate, loaders
from parts.data.check import check
from parts.data.frame import Frame
from parts.data.reading import Reading
from parts.data.tables import DataError, read_tables

HEIGHT, WIDTH = 24, 40
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[5:15, 8:30] = True


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in train.csv, two in val.csv and in test.csv, none wrong."""
    for start, split, count in ((0, "train", 4), (4, "val", 2), (6, "test", 2)):
        rows = []
        for i in range(start, start + count):
            picture(i).save(tmp_path / f"{i}.png")
            Image.fromarray(MASK).save(tmp_path / f"{i}_mask.png")
            rows.append([i, f"{i}.png", f"{i}_mask.png"])
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["", "image", "label"], *rows])
    return tmp_path


def test_a_good_data_set(folder: Path) -> None:
    splits = read_tables(folder)
    Image.fromarray(MASK.astype(np.uint8) * 255).save(folder / "3_mask.png")
    report = check(splits)
    assert report.lines == [
        "4 images for train, 2 images for val, 2 images for test",
        "images: 8 of 8 bits",
        "masks: 7 of values 0 and 1, 1 of values 0 and 255",  # so that a mixture shows
        "Warning: 2 images for the test are too few to compare results.",
    ]
    assert [len(splits[split]) for split in ("train", "val", "test")] == [4, 2, 2]
    assert splits["val"][0].image == folder / "4.png"
    assert splits["val"][0].label == folder / "4_mask.png"


def digests_of(folder: Path) -> tuple[str, str]:
    report = check(read_tables(folder))
    return report.trained_on, report.tested_on


def test_a_data_set_is_known_by_its_contents(folder: Path, tmp_path_factory) -> None:
    trained_on, tested_on = digests_of(folder)
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "data")
    (moved / "0.png").rename(moved / "other.png")
    table = (moved / "train.csv").read_text()
    (moved / "train.csv").write_text(table.replace("0.png", "other.png"))
    picture(9).save(moved / "7.png")  # an image of the test
    assert digests_of(moved)[0] == trained_on
    assert digests_of(moved)[1] != tested_on
    shutil.copy(folder / "7.png", moved)
    Image.fromarray(~MASK).save(moved / "5_mask.png")
    assert digests_of(moved)[0] != trained_on
    assert digests_of(moved)[1] == tested_on


def test_images_that_use_few_of_16_bits(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        values = rng.integers(0, 4096, (HEIGHT, WIDTH), dtype=np.uint16)
        Image.fromarray(values).save(folder / f"{i}.png")
    splits = read_tables(folder)
    # One that uses all bits says nothing about the others.
    Image.fromarray(np.full((HEIGHT, WIDTH), 40000, dtype=np.uint16)).save(folder / "7.png")
    with pytest.raises(DataError, match=r"of 65535: has it fewer bits.* 0 4095, or") as error:
        check(splits)
    assert len(error.value.problems) == 7
    report = check(splits, Reading(image_range=(0, 65535)))
    assert "images: 8 of range 0 to 65535" in report.lines


def turn(path: Path, orientation: int, side: int | None = None) -> None:
    """Save a picture, perhaps as a square, with an orientation in EXIF."""
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = orientation
    image = image.resize((side, side) if side else image.size)
    image.save(path, exif=exif)


def test_turned_images_are_counted(folder: Path) -> None:
    for name in ("1.png", "1_mask.png"):
        turn(folder / name, 3)
    # A mask that was drawn on the upright image has its size, and no need of EXIF.
    turn(folder / "2.png", 6)
    Image.fromarray(np.rot90(MASK, 3).copy()).save(folder / "2_mask.png")
    report = check(read_tables(folder))
    assert "images: 8 of 8 bits, 2 turned upright as EXIF says" in report.lines
    assert "masks: 8 of values 0 and 1, 1 turned upright as EXIF says" in report.lines


@pytest.mark.parametrize(("orientation", "side"), [(2, None), (3, None), (6, 30), (8, 30)])
@pytest.mark.parametrize("turned", ["1.png", "1_mask.png"])
def test_an_image_is_turned_with_its_mask(
    turned: str, orientation: int, side: int | None, folder: Path
) -> None:
    for name in ("1.png", "1_mask.png"):
        turn(folder / name, orientation if name == turned else 1, side)
    with pytest.raises(DataError, match=r"train\.csv line 3: EXIF turns .*1.png and its mask"):
        check(read_tables(folder))


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def resave(name: str, size: tuple[int, int]) -> Callable[[Path], object]:
    return lambda folder: Image.open(folder / name).resize(size).save(folder / name)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:400])


def half_a_jpeg(name: str) -> Callable[[Path], object]:
    jpeg = io.BytesIO()
    picture(0).resize((WIDTH * 4, HEIGHT * 4)).save(jpeg, "JPEG")
    return write(name, jpeg.getvalue()[: len(jpeg.getvalue()) // 2])


BAD = {
    "missing image": (lambda f: (f / "1.png").unlink(), "train.csv line 3: image", "is missing"),
    "missing mask": (lambda f: (f / "4_mask.png").unlink(), "val.csv line 2: mask", "is missing"),
    "sizes": (resave("6_mask.png", (20, 24)), "test.csv line 2", "is 40 x 24 and its mask"),
    "empty": (
        lambda f: Image.new("L", (WIDTH, HEIGHT)).save(f / "2_mask.png"),
        "train.csv line 4: mask",
        "is empty",
    ),
    "no image": (
        write("3.png", b"<html>not found</html>"),
        "train.csv line 5",
        "cannot be read: Pillow knows no such format; save it as PNG",
    ),
    "truncated": (truncate("7.png"), "test.csv line 3: image", "cannot be read"),
    "truncated mask": (
        lambda f: (f / "0_mask.png").write_bytes((f / "0_mask.png").read_bytes()[:60]),
        "train.csv line 2: mask",
        "cannot be read",
    ),
    "half a JPEG": (half_a_jpeg("7_mask.png"), "test.csv line 3: mask", "cannot be read"),
    "labels": (
        lambda f: Image.fromarray(MASK + np.eye(HEIGHT, WIDTH, dtype=np.uint8)).save(
            f / "5_mask.png"
        ),
        "val.csv line 3: mask",
        "holds values 0, 1, 2: a label map?",
    ),
    "in two splits": (
        lambda f: shutil.copy(f / "0.png", f / "5.png"),
        "val.csv line 3",
        "is also in train.csv line 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, folder: Path) -> None:
    spoil, row, what = BAD[case]
    spoil(folder)
    with pytest.raises(DataError) as error:
        check(read_tables(folder))
    (problem,) = error.value.problems
    assert problem.text.startswith(row)
    assert what in problem.text


def test_all_bad_files_at_once(folder: Path) -> None:
    for spoil, _, _ in BAD.values():
        if spoil is not BAD["in two splits"][0]:
            spoil(folder)
    shutil.copy(folder / "5.png", folder / "0.png")
    with pytest.raises(DataError) as error:
        check(read_tables(folder))
    assert len(error.value.problems) == len(BAD)
    lines = [problem.text for problem in error.value.problems]
    for case, (_, row, what) in BAD.items():
        if case != "in two splits":
            assert any(row in line and what in line for line in lines)
    assert "val.csv line 3" in str(error.value)
    assert f"{len(BAD)} problems" in str(error.value)


@pytest.mark.parametrize(("keep_aspect", "y"), [(True, 2), (False, 80 / 24)])
def test_a_row_as_a_model_sees_it(keep_aspect: bool, y: float, folder: Path) -> None:
    rows = MaskedImages(read_tables(folder)["train"], Frame(80, keep_aspect))
    batch = collate([rows[2], rows[1]])
    assert batch.images.shape == (2, 3, 80, 80)
    # The mask of 22 by 10 pixels, scaled with its image; its box goes around it.
    left, top, right, bottom = batch.boxes[0].tolist()
    assert (left, right) == (8 * 2, 29 * 2)
    assert (top, bottom) == pytest.approx((5 * y, 14 * y))
    rows_on, columns_on = batch.masks[0].any(1).nonzero(), batch.masks[0].any(0).nonzero()
    assert (columns_on.min(), columns_on.max()) == (8 * 2, 30 * 2 - 1)
    assert (rows_on.min(), rows_on.max()) == (round(5 * y), round(15 * y) - 1)
    assert batch.valid.sum() == 2 * 80 * 24 * y
    assert batch.index == [2, 1]
    assert all(torch.equal(truth, torch.from_numpy(MASK)) for truth in batch.truths)
    assert all(known.all() for known in batch.known)


def test_what_is_ignored_does_not_count(folder: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    values[4:16, 7:31] = 255
    values[5:15, 8:30] = 1
    Image.fromarray(values).save(folder / "1_mask.png")
    reading = Reading(ignore=[(255, 255)])
    batch = collate([MaskedImages(read_tables(folder)["train"], Frame(80, True), reading)[1]])
    assert torch.equal(batch.truths[0], torch.from_numpy(values == 1))
    assert torch.equal(batch.known[0], torch.from_numpy(values != 255))
    scaled = torch.zeros(80, 80, dtype=torch.bool)
    scaled[: 2 * HEIGHT, : 2 * WIDTH] = (
        batch.known[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    assert torch.equal(batch.valid[0], scaled)
    assert not (batch.masks & ~batch.valid).any()


def test_strips_keep_a_row(folder: Path) -> None:
    """A picture of 2 by 2000 pixels, which 80 pixels would scale to nothing."""
    strip = np.random.default_rng(0).integers(0, 256, (2, 2000, 3), dtype=np.uint8)
    mask = np.zeros((2, 2000), dtype=bool)
    mask[:1, 50:1000] = True
    Image.fromarray(strip).save(folder / "1.png")
    Image.fromarray(mask).save(folder / "1_mask.png")
    splits = read_tables(folder)
    check(splits)
    for keep_aspect in (True, False):
        frame = Frame(80, keep_aspect)
        batch = collate([MaskedImages(splits["train"], frame)[1]])
        assert batch.masks.any()
        assert batch.valid.any(2).sum() == (1 if keep_aspect else 80)
        assert frame.restore(torch.zeros(20, 20), 2, 2000).shape == (2, 2000)


def test_order_of_training(folder: Path) -> None:
    def epochs(seed: int) -> list[list[int]]:
        order = torch.Generator().manual_seed(seed)
        read = read_tables(folder), Frame(16, True), Reading()
        train, val, test = loaders(*read, batch_size=3, workers=0, order=order)
        assert [batch.index for loader in (val, test) for batch in loader] == [[0, 1], [0, 1]]
        drawn = [[batch.index for batch in train] for _ in range(8)]
        assert all(len(batches) == 1 for batches in drawn)  # the fourth image makes no batch
        return [batches[0] for batches in drawn]

    assert epochs(0) == epochs(0)
    assert len({tuple(epoch) for epoch in epochs(0)}) > 2


def test_check_data(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(check_data.RECIPES, "leaf", check_data.Recipe(6, 2))
    check_data.main([str(folder), "leaf"])
    said = capsys.readouterr().out
    assert "is leaf\n" in said
    assert "4 images for train, 2 images for val, 2 images for test" in said
    (folder / "1.png").unlink()
    monkeypatch.setitem(check_data.RECIPES, "leaf", check_data.Recipe(498, 90))
    with pytest.raises(SystemExit) as error:
        check_data.main([str(folder), "leaf"])
    message = str(error.value)
    assert "3 problems" in message
    assert "training and validation: 6 images, not 498" in message
    assert "test.csv: 2 images, not 90" in message
    assert "train.csv line 3" in message
    with pytest.raises(SystemExit, match=r"test_CAMO\.csv"):
        check_data.main([str(folder), "camo"])


def test_check_data_of_ones_own(folder: Path, capsys) -> None:
    check_data.main(["--data", str(folder)])
    assert "masks: 8 of values 0 and 1\n" in capsys.readouterr().out
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").unlink()
    images, masks = folder, folder / "masks"
    for i in range(20):
        picture(i).save(images / f"{i}.png")
        (images / f"{i}_mask.png").unlink(missing_ok=True)
        (masks / "old").mkdir(parents=True, exist_ok=True)
        Image.fromarray(MASK * np.uint8(1 + i % 2)).save(masks / f"{i}.png")
    Image.fromarray(MASK).save(masks / "old" / "1.png")
    Image.fromarray(MASK).save(masks / "old" / "._1.png")
    asked = ["--images", str(images), "--masks", str(masks)]
    check_data.main([*asked, "--foreground", "1", "2"])
    said = capsys.readouterr().out
    assert f"Warning: files in folders within {masks} are left out, 1 in all." in said
    assert said.count("are left out") == 1
    assert "masks: 10 of values 0 and 1, 10 of values 0 and 2" in said
    with pytest.raises(SystemExit) as error:
        check_data.main([*asked, "--foreground", "2"])
    *_, first, second = [line for line in str(error.value).splitlines() if "train " in line]
    assert "is empty, values 0 and 1; leave it and its image out" in first
    assert first < second
    with pytest.raises(SystemExit, match=r"--test-table is for --data, got t.csv; leave"):
        check_data.main([*asked, "--test-table", "t.csv"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either --data or both"),
        ("data", "give a name after "),
        ("data leaf --data data", "give either a folder and a name, or --data"),
    ],
)
def test_what_to_check(arguments: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        check_data.main(arguments.split())
    assert message in capsys.readouterr().err
