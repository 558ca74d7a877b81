"""Every file of a data set, opened before training starts."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from parts.data.coco import read_coco
from parts.data.reading import (
    TWO_VALUED,
    UPRIGHT,
    ContentError,
    ObjectMask,
    ReadImage,
    Reading,
    ReadMask,
    read_image,
    read_mask,
    reading_of,
)
from parts.data.tables import (
    DataError,
    Problem,
    Row,
    Splits,
    files_below,
    read_folders,
    read_tables,
)
from parts.errors import InputError, first_line
from parts.files import digest
from parts.options import TEST_TABLE

FEW_TESTS = 10
LISTED = 5  # kinds of files, in the report
SIDEWAYS = range(5, 9)  # orientations of EXIF that exchange width and height

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

    @property
    def tested_on(self) -> str:
        """A name for the contents of the files for the test."""
        return hashlib.sha256(repr(self.digests["test"]).encode()).hexdigest()


def read_data(options: argparse.Namespace) -> tuple[Splits, Report]:
    """Find the rows that the options of a run name, check every file, and print what was found.

    Raises:
        InputError: If anything is wrong.
    """
    if options.data is None and options.test_table != TEST_TABLE:
        raise InputError(f"--test-table is for --data, got {options.test_table}; leave it out")
    if options.data is not None:
        splits = read_tables(options.data, options.test_table)
    elif options.coco is not None:
        if options.foreground or options.ignore:
            raise InputError("--foreground and --ignore are for --data and --masks; leave them out")
        splits = read_coco(options.coco, options.images)
    else:
        folders = options.images, options.masks
        for folder, other in (folders, folders[::-1]):
            deeper = files_below(folder, other)
            if deeper:
                print(f"Warning: files in folders within {folder} are left out, {deeper} in all.")
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
    problems += leaks(splits, checked)
    if problems:
        raise DataError(problems)
    lines = [
        ", ".join(f"{len(members)} images for {split}" for split, members in splits.items()),
        summary("images", [row.image for row in checked if row.image is not None]),
        summary("masks", [row.mask for row in checked if row.mask is not None]),
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
    except (ContentError, OSError) as error:
        problems.append(unreadable(row.source, "image", row.image, error))
    try:
        mask = read_mask(row.label, reading)
        digests[1] = digest_of_mask(row.label)
    except (ContentError, OSError) as error:
        problems.append(unreadable(row.source, "mask", row.label, error))
    if mask is not None and not mask.object.any():
        text = f"mask {row.label} is empty, {mask.kind}; leave it and its image out"
        problems.append(Problem("an empty mask", f"{row.source}: {text}"))
    if image is not None and mask is not None and image.rgb.shape[:2] != mask.object.shape:
        (h, w), (mask_h, mask_w) = image.rgb.shape[:2], mask.object.shape
        text = f"{row.image} is {w} x {h} and its mask {row.label} {mask_w} x {mask_h}"
        problems.append(Problem("an image and its mask of two sizes", f"{row.source}: {text}"))
    if image is not None and mask is not None and image.turned != mask.turned:
        h, w = mask.object.shape
        # Where one of them was turned on its side, their equal sizes say that both are upright.
        if h == w or (image.turned in SIDEWAYS) == (mask.turned in SIDEWAYS):
            kind = "an image and its mask that EXIF turns differently"
            text = f"EXIF turns {row.image} and its mask {row.label} differently"
            remedy = "save both as they should be seen, without an orientation in EXIF"
            problems.append(Problem(kind, f"{row.source}: {text}; {remedy}"))
    return Checked(
        problems,
        None if image is None else image._replace(rgb=NOTHING),
        None if mask is None else mask._replace(object=NOTHING, known=NOTHING),
        (digests[0], digests[1]),
    )


def digest_of_mask(label: Path | ObjectMask) -> str:
    """Return a name for the content of a mask."""
    if isinstance(label, ObjectMask):
        return hashlib.sha256(repr((label.size, label.counts)).encode()).hexdigest()
    return digest(label)


def unreadable(source: str, what: str, path: object, error: ContentError | OSError) -> Problem:
    """Return why a file cannot be used, which is an image or a mask and named in a row."""
    if isinstance(error, FileNotFoundError):
        return Problem(f"a missing {what}", f"{source}: {what} {path} is missing")
    if isinstance(error, ContentError):
        kind = f"a {what} that holds something else"
        return Problem(kind, f"{source}: {what} {path} holds {error}")
    text = f"{source}: {what} {path} cannot be read: {why(error)}"
    return Problem(f"an unreadable {what}", text)


def why(error: OSError) -> str:
    """Return why Pillow cannot read a file, and what to do."""
    if isinstance(error, UnidentifiedImageError):
        return "Pillow knows no such format; save it as PNG, or as TIFF of up to 32 bits a value"
    return error.strerror or first_line(error)


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


def summary(what: str, files: Sequence[ReadImage | ReadMask]) -> str:
    """Return how many files there are of each kind, and how many were turned."""
    most = Counter(file.kind for file in files).most_common()
    lines = [f"{count} of {kind}" for kind, count in most[:LISTED]]
    others = most[LISTED:]
    if others:
        lines.append(f"{sum(count for _, count in others)} of {len(others)} other kinds")
    turned = sum(file.turned != UPRIGHT for file in files)
    if turned:
        lines.append(f"{turned} turned upright as EXIF says")
    return f"{what}: {', '.join(lines)}"
