"""Every file of a data set, opened before training starts."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from parts.data.reading import (
    DEEP,
    TWO_VALUED,
    UNREADABLE,
    ReadImage,
    Reading,
    ReadMask,
    read_image,
    read_mask,
    reading_of,
)
from parts.data.tables import DataError, Problem, Row, Splits, read_folders, read_tables
from parts.errors import describe
from parts.files import digest

# Images that use less than this share of 16 bits have fewer, and would come out nearly black.
LEAST_SHARE = 0.25
FEW_TESTS = 10
LISTED = 5  # kinds of files, in the report

NOTHING = np.zeros((0, 0), dtype=bool)


class Checked(NamedTuple):
    """A row of a data set after its files were opened."""

    problems: list[Problem]
    image: ReadImage | None
    mask: ReadMask | None
    digests: tuple[str, str]  # of the contents of image and mask, empty if they cannot be read


class Report(NamedTuple):
    """What a data set holds."""

    lines: list[str]  # what was found, in words
    digests: dict[str, list[tuple[str, str]]]  # of image and mask of each row, by split

    @property
    def trained_on(self) -> str:
        """A name for the contents of the files for training and validation."""
        both = self.digests["train"], self.digests["val"]
        return hashlib.sha256(repr(both).encode()).hexdigest()


def read_data(options: argparse.Namespace) -> tuple[Splits, Report]:
    """Find the rows that the options of a run name, check every file, and print what was found.

    Raises:
        DataError: If anything is wrong.
    """
    if options.data is not None:
        splits = read_tables(options.data, options.test_table)
    else:
        splits = read_folders(options.images, options.masks)
    report = check(splits, reading_of(options))
    print(*report.lines, sep="\n")
    return splits, report


def check(splits: Splits, reading: Reading = TWO_VALUED) -> Report:
    """Open every file of a data set.

    Raises:
        DataError: If anything is wrong. It names, with their rows, all files that are missing or
            cannot be read, masks that are not two-valued, empty or of another size than their
            image, and images that occur in two splits.
    """
    rows = [row for members in splits.values() for row in members]
    with ThreadPoolExecutor() as threads:
        found = threads.map(partial(check_row, reading=reading), rows)
        # The pictures themselves are not kept, but for what is said about them.
        checked = list(tqdm(found, "checking the data", len(rows), ncols=80))
    problems = [problem for row in checked for problem in row.problems]
    problems += leaks(splits, checked) + shallow(rows, checked, reading)
    if problems:
        raise DataError(problems)
    lines = [
        ", ".join(f"{len(members)} images for {split}" for split, members in splits.items()),
        summary("images", (row.image.kind for row in checked if row.image is not None)),
        summary("masks", (row.mask.kind for row in checked if row.mask is not None)),
    ]
    if len(splits["test"]) < FEW_TESTS:
        lines.append(
            f"Warning: {len(splits['test'])} images for the test are too few to compare results."
        )
    digests = iter(row.digests for row in checked)
    found = {split: [next(digests) for _ in members] for split, members in splits.items()}
    return Report(lines, found)


def check_row(row: Row, reading: Reading) -> Checked:
    """Open image and mask of a row, and return what was found, without the pictures."""
    problems: list[Problem] = []
    image = mask = None
    digests = ["", ""]
    try:
        image = read_image(row.image, reading)
        digests[0] = digest(row.image)
    except UNREADABLE as error:
        problems.append(unreadable(row.source, "image", row.image, error))
    try:
        mask = read_mask(row.label, reading)
        digests[1] = digest(row.label)
    except UNREADABLE as error:
        problems.append(unreadable(row.source, "mask", row.label, error))
    if mask is not None and not mask.object.any():
        problems.append(
            Problem("an empty mask", f"{row.source}: mask {row.label} is empty, {mask.kind}")
        )
    if image is not None and mask is not None and image.rgb.shape[:2] != mask.object.shape:
        (h, w), (mask_h, mask_w) = image.rgb.shape[:2], mask.object.shape
        text = f"{row.image} is {w} x {h} and its mask {row.label} {mask_w} x {mask_h}"
        problems.append(Problem("an image and its mask of two sizes", f"{row.source}: {text}"))
    return Checked(
        problems,
        None if image is None else image._replace(rgb=NOTHING),
        None if mask is None else mask._replace(object=NOTHING, known=NOTHING),
        (digests[0], digests[1]),
    )


def unreadable(source: str, what: str, path: Path, error: Exception) -> Problem:
    """Return why a file cannot be used, which is an image or a mask and named in a row."""
    if isinstance(error, FileNotFoundError):
        return Problem(f"a missing {what}", f"{source}: {what} {path} is missing")
    if type(error) is ValueError:  # the words of the rule for images and masks
        kind = f"a {what} that holds something else"
        return Problem(kind, f"{source}: {what} {path} holds {error}")
    reason = describe(error) if isinstance(error, OSError) else str(error).splitlines()[0]
    return Problem(f"an unreadable {what}", f"{source}: {what} {path} cannot be read: {reason}")


def leaks(splits: Splits, checked: list[Checked]) -> list[Problem]:
    """Return which images occur in two splits."""
    found = iter(checked)
    first: dict[str, tuple[str, Row]] = {}
    problems = []
    for split, members in splits.items():
        for row in members:
            image_digest, _ = next(found).digests
            if not image_digest:
                continue
            earlier_split, earlier = first.setdefault(image_digest, (split, row))
            if earlier_split != split:
                text = f"{row.source}: {row.image} is also in {earlier.source}"
                problems.append(Problem("an image in two splits", text))
    return problems


def shallow(rows: list[Row], checked: list[Checked], reading: Reading) -> list[Problem]:
    """Return that images of 16 bits have fewer, if all of them together use so little."""
    deep = [
        (row.image.largest, place)
        for row, place in zip(checked, rows, strict=True)
        if row.image is not None and row.image.largest is not None
    ]
    if reading.image_range is not None or not deep or max(deep)[0] >= LEAST_SHARE * DEEP:
        return []
    largest, row = max(deep)
    text = (
        f"{row.source}: image {row.image} has the largest value of {len(deep)} images of 16 bits, "
        f"{largest:g} of {DEEP}: have they fewer bits? Give their range, such as --image-range 0 "
        f"{2 ** int(largest).bit_length() - 1}, or --image-range 0 {DEEP} if they are so dark"
    )
    return [Problem("images of fewer bits", text)]


def summary(what: str, kinds: Iterable[str]) -> str:
    """Return how many files there are of each kind."""
    most = Counter(kinds).most_common()
    lines = [f"{count} of {kind}" for kind, count in most[:LISTED]]
    others = most[LISTED:]
    if others:
        lines.append(f"{sum(count for _, count in others)} of {len(others)} other kinds")
    return f"{what}: {', '.join(lines)}"
