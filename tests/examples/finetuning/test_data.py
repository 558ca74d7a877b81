"""Data sets as people have them: encodings of masks, and everything that can be wrong."""

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
from parts.data import (
    DataError,
    MaskedImages,
    Row,
    check,
    collate,
    loaders,
    read_folders,
    read_image,
    read_mask,
    read_tables,
)
from parts.frame import Frame

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


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(MASK.astype(np.uint8), mode="P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


ENCODINGS = {
    "0 and 1": Image.fromarray(MASK.astype(np.uint8)),
    "0 and 255": Image.fromarray(MASK.astype(np.uint8) * 255),
    "0 and 254": Image.fromarray(MASK.astype(np.uint8) * 254),
    "one bit": Image.fromarray(MASK),
    "16 bit": Image.fromarray(MASK.astype(np.uint16) * 65535),
    "32 bit": Image.fromarray(MASK.astype(np.int32)),
    "colours": Image.fromarray(np.stack([MASK.astype(np.uint8) * 255] * 3, axis=-1)),
    "with alpha": Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGBA"),
    "black and white palette": palette((0, 0, 0), (255, 255, 255)),
    "black and dark red palette": palette((0, 0, 0), (128, 0, 0)),
    "three values": Image.fromarray(
        np.where(MASK, np.where(np.arange(WIDTH) < 12, 128, 255), 0).astype(np.uint8)
    ),
    "soft below the threshold": Image.fromarray(
        np.where(MASK, 255, np.arange(WIDTH) % 120).astype(np.uint8)
    ),
    "soft 16 bit": Image.fromarray(np.where(MASK, 65535, np.arange(WIDTH) * 700).astype(np.uint16)),
    "probabilities": Image.fromarray(np.where(MASK, 0.9, np.arange(WIDTH) / 100).astype("f4")),
}
TIFF = ("32 bit", "probabilities")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_masks_of_any_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / ("mask.tif" if encoding in TIFF else "mask.png")
    ENCODINGS[encoding].save(path)
    np.testing.assert_array_equal(read_mask(path), MASK)


def test_jpeg_masks(tmp_path: Path) -> None:
    mask = np.kron(MASK, np.ones((7, 7), dtype=bool))
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=60)
    values = np.asarray(Image.open(tmp_path / "mask.jpg"))
    assert ((values > 0) & (values < 8)).any()  # the residue that a threshold at 0 would keep
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.jpg"), mask)

    noise = np.random.default_rng(0).integers(0, 8, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "empty.png")
    assert not read_mask(tmp_path / "empty.png").any()


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_may_fill_the_image(value: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").all()


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(0).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(MASK).convert("L").save(tmp_path / "mask.png", exif=exif)
    upright = np.rot90(np.asarray(picture(0)), 3)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), upright)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), np.rot90(MASK, 3))


def test_16_bit_images_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert np.abs(image[..., 0] - ramp / 257).max() <= 1


def test_a_good_data_set(folder: Path) -> None:
    splits = read_tables(folder)
    check(splits)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [4, 2, 2]
    assert splits["val"][0].image == folder / "4.png"
    assert splits["val"][0].label == folder / "4_mask.png"


@pytest.mark.parametrize("header", ["image,label,note", ",image,label", "label,image"])
def test_tables_as_excel_writes_them(header: str, folder: Path) -> None:
    cells = {"image": "0.png", "label": "0_mask.png"}
    row = ",".join(cells.get(name, "7") for name in header.split(","))
    (folder / "train.csv").write_text(f"{header}\r\n{row}\r\n", encoding="utf-8-sig")
    expected = Row(folder / "0.png", folder / "0_mask.png", "train.csv line 2")
    assert read_tables(folder)["train"] == [expected]


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
    "no image": (write("3.png", b"<html>not found</html>"), "train.csv line 5", "cannot be read"),
    "truncated": (truncate("7.png"), "test.csv line 3: image", "cannot be read"),
    "truncated mask": (
        lambda f: (f / "0_mask.png").write_bytes((f / "0_mask.png").read_bytes()[:60]),
        "train.csv line 2: mask",
        "cannot be read",
    ),
    "half a JPEG": (half_a_jpeg("7_mask.png"), "test.csv line 3: mask", "cannot be read"),
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
    assert problem.startswith(row)
    assert what in problem


def test_all_bad_files_at_once(folder: Path) -> None:
    for spoil, _, _ in BAD.values():
        if spoil is not BAD["in two splits"][0]:
            spoil(folder)
    shutil.copy(folder / "5.png", folder / "0.png")
    with pytest.raises(DataError) as error:
        check(read_tables(folder))
    assert len(error.value.problems) == len(BAD)
    for case, (_, row, what) in BAD.items():
        if case != "in two splits":
            assert any(row in problem and what in problem for problem in error.value.problems)
    assert "val.csv line 3" in str(error.value)
    assert f"{len(BAD)} problems" in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val.csv").unlink(), "val.csv: "),
        (write("val.csv", b",image,mask\n0,4.png,4_mask.png\n"), "val.csv: no column label"),
        (write("val.csv", b""), "val.csv: no column image and label"),
        (write("val.csv", b",image,label\n"), "val.csv: no rows"),
        (write("val.csv", b",image,label\n0,4.png,\n1,5.png,x\n"), "val.csv line 2: no image or"),
        (write("val.csv", b",image,label\n0,,4_mask.png\n1,5.png,x\n"), "val.csv line 2: no image"),
        (write("val.csv", b",image,label\n1,5.png,x\n0,4.png\n"), "val.csv line 3: no image or"),
        (write("val.csv", b"\xff\xfe,\x00image"), "val.csv: "),
    ],
)
def test_bad_tables(spoil: Callable[[Path], object], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(DataError) as error:
        read_tables(folder)
    (problem,) = error.value.problems
    assert problem.startswith(message)


def test_all_bad_tables_at_once(folder: Path) -> None:
    (folder / "train.csv").write_text(",image,label\n0,,a.png\n1,0.png,0_mask.png\n2,b.png,\n")
    (folder / "val.csv").write_text(",image\n")
    (folder / "test.csv").unlink()
    with pytest.raises(DataError) as error:
        read_tables(folder)
    starts = ("train.csv line 2: ", "train.csv line 4: ", "val.csv: ", "test.csv: ")
    assert len(error.value.problems) == len(starts)
    assert all(p.startswith(start) for p, start in zip(error.value.problems, starts, strict=True))


def pairs(tmp_path: Path, count: int) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(count):
        (images / f"{i}.jpg").touch()
        (masks / f"{i}.png").touch()
    return images, masks


def test_folders_are_split_by_names(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 47)
    (images / ".hidden").touch()
    splits = read_folders(images, masks)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [39, 4, 4]
    rows = [row for split in splits.values() for row in split]
    assert {row.image for row in rows} == set(images.glob("*.jpg"))
    assert all(row.image.stem == row.label.stem for row in rows)
    assert read_folders(images, masks) == splits
    moved = [folder.rename(tmp_path / f"moved_{folder.name}") for folder in (images, masks)]
    for split, members in read_folders(*moved).items():
        assert [row.image.name for row in members] == [row.image.name for row in splits[split]]


def test_ten_pairs_are_enough(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 8)
    for name in ("scan.1", "scan.2"):  # a dot inside of a name
        (images / f"{name}.jpg").touch()
        (masks / f"{name}.png").touch()
    splits = read_folders(images, masks)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [8, 1, 1]


def test_all_files_without_a_partner(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 8)
    for path in (images / "a.jpg", images / "b.jpg", masks / "c.png"):
        path.touch()
    with pytest.raises(DataError) as error:
        read_folders(images, masks)
    lonely = ("a.jpg: no mask", "b.jpg: no mask", "c.png: no image", "10 pairs or more")
    assert len(error.value.problems) == len(lonely)
    assert all(what in p for p, what in zip(error.value.problems, lonely, strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "masks" / "3.png").unlink(), "3.jpg: no mask of that name"),
        (lambda f: (f / "images" / "3.jpg").unlink(), "3.png: no image of that name"),
        (lambda f: (f / "images" / "3.png").touch(), "3.png: a second file of that name"),
        (lambda f: shutil.rmtree(f / "masks"), "masks: no such folder"),
    ],
)
def test_bad_folders(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 12)
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        read_folders(images, masks)
    (problem,) = error.value.problems
    assert problem.endswith(message)


def test_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 pairs or more"):
        read_folders(*pairs(tmp_path, 9))


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


def test_order_of_training(folder: Path) -> None:
    def epochs(seed: int) -> list[list[int]]:
        order = torch.Generator().manual_seed(seed)
        train, val, test = loaders(read_tables(folder), Frame(16, True), 3, 0, order)
        assert [batch.index for loader in (val, test) for batch in loader] == [[0, 1], [0, 1]]
        drawn = [[batch.index for batch in train] for _ in range(8)]
        assert all(len(batches) == 1 for batches in drawn)  # the fourth image makes no batch
        return [batches[0] for batches in drawn]

    assert epochs(0) == epochs(0)
    assert len({tuple(epoch) for epoch in epochs(0)}) > 2


def test_check_data(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(check_data.RECIPES, "leaf", check_data.Recipe(6, 2))
    check_data.main([str(folder), "leaf"])
    assert "is leaf: 4 train, 2 val, 2 test" in capsys.readouterr().out
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
