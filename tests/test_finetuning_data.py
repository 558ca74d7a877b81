"""Data sets as people have them: encodings of masks, and everything that can be wrong."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
HEIGHT, WIDTH = 24, 40
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[5:15, 8:30] = True


@pytest.fixture(autouse=True)
def examples(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


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
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_masks_of_any_encoding(encoding: str, tmp_path: Path) -> None:
    from finetuning.data import read_mask

    path = tmp_path / ("mask.tif" if encoding == "32 bit" else "mask.png")
    ENCODINGS[encoding].save(path)
    np.testing.assert_array_equal(read_mask(path), MASK)


def test_jpeg_masks(tmp_path: Path) -> None:
    from finetuning.data import read_mask

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
    from finetuning.data import read_mask

    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").all()


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    from finetuning.data import read_image, read_mask

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(0).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(MASK).convert("L").save(tmp_path / "mask.png", exif=exif)
    upright = np.rot90(np.asarray(picture(0)), 3)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), upright)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), np.rot90(MASK, 3))


def test_a_good_data_set(folder: Path) -> None:
    from finetuning.data import check, read_tables

    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text("\ufeff" + text, encoding="utf-8")  # as Excel writes it
    splits = read_tables(folder)
    check(splits)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [4, 2, 2]
    assert splits["val"][0].image == folder / "4.png"
    assert splits["val"][0].label == folder / "4_mask.png"


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def resave(name: str, size: tuple[int, int]) -> Callable[[Path], object]:
    return lambda folder: Image.open(folder / name).resize(size).save(folder / name)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:400])


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
    "in two splits": (
        lambda f: shutil.copy(f / "0.png", f / "5.png"),
        "val.csv line 3",
        "is also in train.csv line 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, folder: Path) -> None:
    from finetuning.data import DataError, check, read_tables

    spoil, row, what = BAD[case]
    spoil(folder)
    with pytest.raises(DataError) as error:
        check(read_tables(folder))
    (problem,) = error.value.problems
    assert problem.startswith(row)
    assert what in problem


def test_all_bad_files_at_once(folder: Path) -> None:
    from finetuning.data import DataError, check, read_tables

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
        (write("val.csv", b"\xff\xfe,\x00image"), "val.csv: "),
    ],
)
def test_bad_tables(spoil: Callable[[Path], object], message: str, folder: Path) -> None:
    from finetuning.data import DataError, read_tables

    spoil(folder)
    with pytest.raises(DataError) as error:
        read_tables(folder)
    (problem,) = error.value.problems
    assert problem.startswith(message)


def pairs(tmp_path: Path, count: int) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for i in range(count):
        (images / f"{i}.jpg").touch()
        (masks / f"{i}.png").touch()
    return images, masks


def test_folders_are_split_by_names_and_seed(tmp_path: Path) -> None:
    from finetuning.data import read_folders

    images, masks = pairs(tmp_path, 47)
    (images / ".hidden").touch()
    splits = read_folders(images, masks, seed=1)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [39, 4, 4]
    rows = [row for split in splits.values() for row in split]
    assert {row.image for row in rows} == set(images.glob("*.jpg"))
    assert all(row.image.stem == row.label.stem for row in rows)
    assert read_folders(images, masks, seed=1) == splits
    assert read_folders(images, masks, seed=2) != splits


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
    from finetuning.data import DataError, read_folders

    images, masks = pairs(tmp_path, 12)
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        read_folders(images, masks)
    (problem,) = error.value.problems
    assert problem.endswith(message)


def test_too_few_pairs(tmp_path: Path) -> None:
    from finetuning.data import DataError, read_folders

    with pytest.raises(DataError, match="10 pairs or more"):
        read_folders(*pairs(tmp_path, 9))


def test_check_data(folder: Path, monkeypatch, capsys) -> None:
    import check_data

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
