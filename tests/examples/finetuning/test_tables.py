"""The rows of a data set: tables and folders as people have them, and what is wrong with them."""

import csv
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from parts.data.tables import DataError, Row, read_folders, read_rows, read_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tables; the files in them need not exist."""
    for start, split, count in ((0, "train", 4), (4, "val", 2), (6, "test", 2)):
        lines = [f"{i},{i}.png,{i}_mask.png" for i in range(start, start + count)]
        (tmp_path / f"{split}.csv").write_text("\n".join([",image,label", *lines, ""]))
    return tmp_path


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize("header", ["image,label,note", ",image,label", "label,image"])
def test_tables_as_excel_writes_them(header: str, folder: Path) -> None:
    cells = {"image": "0.png", "label": "0_mask.png"}
    row = ",".join(cells.get(name, "7") for name in header.split(","))
    (folder / "train.csv").write_text(f"{header}\r\n{row}\r\n", encoding="utf-8-sig")
    expected = Row(folder / "0.png", folder / "0_mask.png", "train.csv line 2")
    assert read_tables(folder)["train"] == [expected]


def test_rows_of_empty_cells_are_no_rows(folder: Path) -> None:
    (folder / "val.csv").write_text(" image ,label\n,\n a.png , b.png\n\n , \nc.png,d.png\n,\n")
    a, c = read_tables(folder)["val"]
    assert a == Row(folder / "a.png", folder / "b.png", "val.csv line 3")
    assert c == Row(folder / "c.png", folder / "d.png", "val.csv line 6")


# Before Python 3.11 its csv refuses the character itself.
NUL = "line contains NUL" if sys.version_info < (3, 11) else "a cell with a line break or a NUL"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val.csv").unlink(), "val.csv: No such file"),
        (write("val.csv", b",image,mask\n0,4.png,4_mask.png\n"), "val.csv: no column label"),
        (write("val.csv", b""), "val.csv: no column image and label"),
        (write("val.csv", b",image,label\n"), "val.csv: no rows"),
        (write("val.csv", b",image,label\n0,4.png,\n1,5.png,x\n"), "val.csv line 2: no label"),
        (write("val.csv", b",image,label\n0,,4_mask.png\n1,5.png,x\n"), "val.csv line 2: no image"),
        (write("val.csv", b",image,label\n1,5.png,x\n0,4.png\n"), "val.csv line 3: 2 cells, but 3"),
        (write("val.csv", b"image,label\na,b,c\n"), "val.csv line 2: 3 cells, but 2"),
        (write("val.csv", b"image,label,label\na,b,c\n"), "val.csv: two columns label"),
        (
            write("val.csv", b"image,label\na,b\nc,d\na,b\n"),
            "val.csv line 4: a and b are also in line 2; remove one",
        ),
        (
            write("val.csv", b'image,label\n"a,b\nc,d\ne,f"\ng,h\n'),
            "val.csv line 2: a cell with a line break",
        ),
        (
            write("val.csv", b'image,label\na,b\n"c,d\ne,f\n'),
            "val.csv line 3: unexpected end of data; does a quotation mark lack its partner?",
        ),
        (
            write("val.csv", b"image,label\na\0,b\n"),
            f"val.csv line 2: {NUL}",
        ),
        (write("val.csv", b"\xff\xfe,\x00image"), "val.csv line 1: no UTF-8"),
    ],
)
def test_bad_tables(spoil: Callable[[Path], object], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(DataError) as error:
        read_tables(folder)
    (problem,) = error.value.problems
    assert message in problem.text


def test_all_bad_tables_at_once(folder: Path) -> None:
    (folder / "train.csv").write_text(",image,label\n0,,a.png\n1,0.png,0_mask.png\n2,b.png,\n")
    (folder / "val.csv").write_text(",image\n")
    (folder / "test.csv").unlink()
    with pytest.raises(DataError) as error:
        read_tables(folder)
    starts = ("train.csv line 2: ", "train.csv line 4: ", "val.csv: ", "test.csv: ")
    assert len(error.value.problems) == len(starts)
    for problem, start in zip(error.value.problems, starts, strict=True):
        assert start in problem.text


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
    for problem, words in zip(error.value.problems, lonely, strict=True):
        assert words in problem.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "masks" / "3.png").unlink(), "3.jpg: no mask of that name"),
        (lambda f: (f / "images" / "3.jpg").unlink(), "3.png: no image of that name"),
        (
            lambda f: (f / "images" / "3.png").touch(),
            "a second file of that name, beside 3.jpg",
        ),
        (lambda f: shutil.rmtree(f / "masks"), "masks: no such folder"),
    ],
)
def test_bad_folders(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 12)
    spoil(tmp_path)
    with pytest.raises(DataError) as error:
        read_folders(images, masks)
    (problem,) = error.value.problems
    assert problem.text.endswith(message)


def test_too_few_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 pairs or more"):
        read_folders(*pairs(tmp_path, 9))


# --- any table -----------------------------------------------------------------------------------

# A file may have any name without a slash and without a line break.
names = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=12
).filter(lambda name: name.strip() == name and name not in (".", ".."))


@given(st.lists(st.tuples(names, names), min_size=1, max_size=5, unique=True))
@example([('a, "quoted" name.png', "forêt.png"), ("fore\u0302t.png", "=1+1.png")])
def test_any_names_in_a_table(tmp_path_factory, cells: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["image", "label"], *cells])
    for members in read_tables(folder).values():
        assert [(row.image, row.label) for row in members] == [
            (folder / image, folder / label) for image, label in cells
        ]


@given(st.binary(max_size=200))
@example(b'image,label\n"open,a.png\n')
@example(b"image,label\na.png,b.png\0\n")
@example("image,label\nfor\u00eat.png,a.png\n".encode("latin-1"))
@example("image,label\na.png,b.png\n".encode("utf-16"))
@example(b"image;label\na.png;b.png\n")
def test_any_bytes_are_read_or_refused_in_a_line(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(content)
    outcome = rows_or_message(path)
    if isinstance(outcome, str):
        assert outcome.startswith("bytes.csv")
        assert "\n" not in outcome
    else:
        assert outcome


def rows_or_message(path: Path) -> list[object] | str:
    try:
        return [*read_rows(path, ("image", "label"))]
    except ValueError as error:
        return str(error)


def test_what_is_no_utf_8_is_found_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("image,label\na.png,b.png\nfor\u00eat.png,c.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv line 3: no UTF-8; save the table as UTF-8"):
        list(read_rows(path, ("image", "label")))


# --- any folders ---------------------------------------------------------------------------------


def touched(folder: Path, names: list[str]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


letters = st.sampled_from("aäeêøñ漢ｱ1_ .-")
stems = st.lists(
    st.text(letters, min_size=1, max_size=6).filter(lambda s: s.strip(" .") == s and s[0] != "-"),
    min_size=10,
    max_size=14,
    unique_by=lambda stem: unicodedata.normalize("NFC", stem),
)


@given(stems, st.sampled_from(["NFC", "NFD"]), st.sampled_from(["NFC", "NFD"]))
def test_accents_of_either_kind_pair_up(tmp_path_factory, stems, first: str, second: str) -> None:
    """A Mac decomposes the accents of names, Windows and Linux do not."""
    base = tmp_path_factory.getbasetemp()
    one = [f"{unicodedata.normalize(first, stem)}.jpg" for stem in stems]
    two = [f"{unicodedata.normalize(second, stem)}.png" for stem in stems]
    splits = read_folders(touched(base / "i", one), touched(base / "m", two))
    rows = [row for members in splits.values() for row in members]
    assert len(rows) == len(stems)
    for row in rows:
        same = [unicodedata.normalize("NFC", path.stem) for path in (row.image, row.label)]
        assert same[0] == same[1]
    # The split does not depend on how the accents are written.
    composed = read_folders(touched(base / "i", [f"{s}.jpg" for s in stems]), base / "m")
    for split, members in composed.items():
        assert [row.source for row in members] == [row.source for row in splits[split]]


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    """As unpacked on Linux from an archive of Windows."""
    for kind in ("i", "m"):
        (tmp_path / kind).mkdir()
        for n in range(10):
            Path(os.fsdecode(os.fsencode(tmp_path / kind) + b"/b\xe4um%d.png" % n)).touch()
    splits = read_folders(tmp_path / "i", tmp_path / "m")
    assert sum(map(len, splits.values())) == 10


def message(images: Path, masks: Path) -> list[str]:
    with pytest.raises(DataError) as error:
        read_folders(images, masks)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("images", "masks", "hint"),
    [
        ("{}.jpg", "{}_mask.png", "100 masks end in _mask: without that they would have partners."),
        ("{}_rgb.jpg", "{}.png", "100 images end in _rgb: without that they would have partners."),
        ("S{}.jpg", "s{}.png", "100 names differ in capitals alone: without that they would have "),
    ],
)
def test_many_lonely_files_are_ten_lines_and_a_remedy(
    images: str, masks: str, hint: str, tmp_path: Path
) -> None:
    numbers = range(100, 200)
    lines = message(
        touched(tmp_path / "i", [images.format(n) for n in numbers]),
        touched(tmp_path / "m", [masks.format(n) for n in numbers]),
    )
    assert lines[0] == "The data set has 201 problems:"
    assert [line for line in lines if line.endswith("more: no mask of that name")] == [
        "... and 90 more: no mask of that name"
    ]
    assert len(lines) == 1 + 11 + 11 + 1 + 1
    assert lines[-1].startswith(hint)
