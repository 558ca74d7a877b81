"""The rows of a data set, found in tables or in two folders, before any picture is opened."""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parts.errors import InputError, describe
from parts.options import SPLITS

if TYPE_CHECKING:
    from parts.data.reading import ObjectMask

SHOWN = 10  # problems of one kind
FEWEST_PAIRS = 10


class Row(NamedTuple):
    """An image, its mask, and the place in a table where they are listed."""

    image: Path
    label: Path | ObjectMask
    source: str


Splits = dict[str, list[Row]]


class Problem(NamedTuple):
    """Something that is wrong with a data set."""

    kind: str  # what is wrong, in the same words for all problems of the kind
    text: str  # the whole line, which names the file or the row


class DataError(InputError):
    """Everything that is wrong with a data set or a table: a line for each problem.

    Up to ten are listed of a kind.
    """

    def __init__(
        self,
        problems: list[Problem],
        hints: Iterable[str] = (),
        *,
        what: str = "The data set has",
    ) -> None:
        counts = Counter(problem.kind for problem in problems)
        shown: Counter[str] = Counter()
        lines = []
        for kind, text in problems:
            shown[kind] += 1
            if shown[kind] <= SHOWN:
                lines.append(text)
            elif shown[kind] == counts[kind]:
                lines.append(f"... and {counts[kind] - SHOWN} more: {kind}")
        head = f"{what} {len(problems)} problem{'s' * (len(problems) > 1)}:"
        super().__init__("\n".join([head, *lines, *hints]))
        self.problems = problems


def read_tables(folder: Path, test_table: str = "test.csv") -> Splits:
    """Read train.csv, val.csv and a test table with columns `image` and `label`.

    The paper's data sets circulate in this layout. Paths are relative to the folder. Other columns
    are ignored, such as the unnamed first one of those data sets.

    Raises:
        DataError: If a table is missing or empty, lacks one of the columns or a cell of them, or
            has a pair twice.
    """
    splits: Splits = {}
    problems: list[Problem] = []
    for split, name in zip(SPLITS, ("train.csv", "val.csv", test_table), strict=True):
        first: dict[tuple[Path, Path], str] = {}
        splits[split] = []
        try:
            for source, row in read_rows(folder / name, ("image", "label")):
                empty = [column for column in ("image", "label") if not row[column]]
                image, label = folder / row["image"], folder / row["label"]
                earlier = first.setdefault((image, label), source)
                if empty:
                    kind = f"no {' and no '.join(empty)} in the row"
                    problems.append(Problem(kind, f"{name} {source}: {kind}"))
                elif earlier != source:
                    kind = "a pair that is there twice"
                    text = f"{row['image']} and {row['label']} are also in {earlier}; remove one"
                    problems.append(Problem(kind, f"{name} {source}: {text}"))
                else:
                    splits[split].append(Row(image, label, f"{name} {source}"))
        except InputError as error:
            problems.append(Problem("tables", str(error)))
    if problems:
        raise DataError(problems)
    return splits


def read_rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of each row of a table, which must have these columns.

    Space around a cell is no part of it, and rows without anything in their cells are no rows.

    Raises:
        InputError: If the table is missing, is not UTF-8, lacks a column or has one twice, if a row
            has more or fewer cells than the first line, or if there is no row.
    """
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(table, [])]
            found = ", ".join(filter(None, header)) or "an empty first line"
            lacking = [column for column in columns if column not in header]
            if lacking:
                raise InputError(
                    f"{path.name}: no column {' and '.join(lacking)} in its first line, which has "
                    f"{found}"
                )
            twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
            if twice:
                raise InputError(
                    f"{path.name}: two columns {' and '.join(twice)} in its first line; remove one"
                )
            any_row = False
            line = table.line_num + 1
            for cells in table:
                source, line = f"line {line}", table.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if any(character in cell for cell in cells for character in "\n\r\0"):
                    raise InputError(
                        f"{path.name} {source}: a cell with a line break or a NUL character; does "
                        "a quotation mark lack its partner?"
                    )
                if len(cells) != len(header):
                    raise InputError(
                        f"{path.name} {source}: {len(cells)} cells, but {len(header)} in the first "
                        "line; a cell with a comma needs quotation marks, and a number a point"
                    )
                any_row = True
                yield source, dict(zip(header, map(str.strip, cells), strict=True))
            if not any_row:
                raise InputError(f"{path.name}: no rows below the first line")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path.name} line {line}: no UTF-8; save the table as UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"{path.name} line {line}: {error}; does a quotation mark lack its partner?"
        ) from error
    except OSError as error:
        raise InputError(describe(error)) from error


def read_folders(images: Path, masks: Path) -> Splits:
    """Pair the files of two folders by their names, and split them 8 : 1 : 1.

    The split depends on nothing but the names. Names that look the same are the same, whether an
    accent is a character of its own or part of its letter.

    Raises:
        DataError: If a folder is missing, if a file has no partner or two of them, or if there are
            fewer than 10 pairs.
    """
    files: list[dict[str, list[Path]]] = []
    problems: list[Problem] = []
    for folder in (images, masks):
        by_name: dict[str, list[Path]] = defaultdict(list)
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    by_name[unicodedata.normalize("NFC", path.stem)].append(path)
        else:
            problems.append(Problem("no such folder", f"{folder}: no such folder"))
        for paths in by_name.values():
            if len(paths) > 1:
                kind = "a second file of that name"
                problems.append(Problem(kind, f"{paths[1]}: {kind}, beside {paths[0].name}"))
        files.append(by_name)
    if problems:
        raise DataError(problems)

    both = sorted(files[0].keys() & files[1].keys())
    for own, other, partner in ((*files, "mask"), (*reversed(files), "image")):
        for name in sorted(own.keys() - other.keys()):
            kind = f"no {partner} of that name"
            problems.append(Problem(kind, f"{own[name][0]}: {kind}"))
    if len(both) < FEWEST_PAIRS:
        kind = f"{FEWEST_PAIRS} pairs or more are needed for three splits, {len(both)} were found"
        problems.append(Problem(kind, f"{images}: {kind}"))
    if problems:
        raise DataError(problems, renaming(*files))
    return {
        split: [Row(files[0][name][0], files[1][name][0], f"{split} {name}") for name in names]
        for split, names in split_names(both).items()
    }


def files_below(folder: Path, other: Path) -> int:
    """Return how many files are in folders within a folder: none that are hidden, or in `other`."""
    return sum(
        path.is_file()
        and not (folder in other.parents and path.is_relative_to(other))
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for path in folder.glob("*/**/*")
    )


def split_names(names: list[str]) -> dict[str, list[str]]:
    """Return which names train, which validate and which test, 8 : 1 : 1, always the same."""
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = [names[i] for i in order]
    tenth = len(names) // 10
    parts = shuffled[2 * tenth :], shuffled[:tenth], shuffled[tenth : 2 * tenth]
    # In a split they are in order again, and so is what is said about them.
    return dict(zip(SPLITS, map(sorted, parts), strict=True))


def renaming(images: dict[str, list[Path]], masks: dict[str, list[Path]]) -> list[str]:
    """Return what would pair most of the names, if there is such a thing."""
    lonely = images.keys() - masks.keys(), masks.keys() - images.keys()
    remedies: Counter[str] = Counter()
    for longer, shorter, whose in ((*reversed(lonely), "masks"), (*lonely, "images")):
        for name in longer:
            # The longest name that it starts with: 12 rather than 1 for 12_mask.
            stem = next((name[:n] for n in range(len(name), 0, -1) if name[:n] in shorter), None)
            if stem is not None:
                remedies[f"{whose} end in {name.removeprefix(stem)}"] += 1
    alike = {name.lower() for name in lonely[0]} & {name.lower() for name in lonely[1]}
    remedies["names differ in capitals alone"] = len(alike)
    remedy, count = remedies.most_common(1)[0]
    return [f"{count} {remedy}: without that they would have partners."] if count > 1 else []
