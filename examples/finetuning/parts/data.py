"""Data sets of images and masks: found, checked before training, and read for a model."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes
from tqdm import tqdm

from parts.frame import Frame

SPLITS = ("train", "val", "test")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class DataError(ValueError):
    """Everything that is wrong with a data set, one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join([f"The data set has {len(problems)} problems:", *problems]))
        self.problems = problems


class Row(NamedTuple):
    """An image, its mask, and the place in a table where they are listed."""

    image: Path
    label: Path
    source: str


Splits = dict[str, list[Row]]


def read_tables(folder: Path, test_table: str = "test.csv") -> Splits:
    """Read train.csv, val.csv and a test table with columns `image` and `label`.

    The paper's data sets circulate in this layout. Paths are relative to the folder. Other columns
    are ignored, such as the unnamed first one of those data sets.

    Raises:
        DataError: If a table is missing or empty, or lacks one of the columns or a cell of them.
    """
    splits: Splits = {}
    problems = []
    for split, name in zip(SPLITS, ("train.csv", "val.csv", test_table), strict=True):
        splits[split] = []
        try:
            with (folder / name).open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file)
                lacking = {"image", "label"} - set(table.fieldnames or ())
                if lacking:
                    problems.append(f"{name}: no column {' and '.join(sorted(lacking))}")
                    continue
                for row in table:
                    source = f"{name} line {table.line_num}"
                    if row["image"] and row["label"]:
                        found = Row(folder / row["image"], folder / row["label"], source)
                        splits[split].append(found)
                    else:
                        problems.append(f"{source}: no image or no label")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(f"{name}: {error}")
            continue
        if not splits[split]:
            problems.append(f"{name}: no rows")
    if problems:
        raise DataError(problems)
    return splits


def read_folders(images: Path, masks: Path) -> Splits:
    """Pair the files of two folders by their names, and split them 8 : 1 : 1.

    The split depends on nothing but the names.

    Raises:
        DataError: If a folder is missing, if a file has no partner or two of them, or if there are
            fewer than 10 pairs.
    """
    stems: list[dict[str, list[Path]]] = []
    problems = []
    for folder in (images, masks):
        by_stem = defaultdict(list)
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder")
        else:
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    by_stem[path.stem].append(path)
        problems += [f"{p[1]}: a second file of that name" for p in by_stem.values() if p[1:]]
        stems.append(by_stem)
    both = sorted(stems[0].keys() & stems[1].keys())
    if not problems:
        for own, other, kind in ((*stems, "mask"), (*reversed(stems), "image")):
            lonely = sorted(own.keys() - other.keys())
            problems += [f"{own[stem][0]}: no {kind} of that name" for stem in lonely]
        if len(both) < 10:
            problems.append(f"{images}: 10 pairs or more are needed for three splits")
    if problems:
        raise DataError(problems)

    order = np.random.default_rng(0).permutation(len(both))
    names = [both[i] for i in order]
    tenth = len(both) // 10
    parts = names[2 * tenth :], names[:tenth], names[tenth : 2 * tenth]
    return {
        split: [Row(stems[0][s][0], stems[1][s][0], f"{split} {s}") for s in part]
        for split, part in zip(SPLITS, parts, strict=True)
    }


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return the picture upright, as RGB of 8 bits, shape (H, W, 3)."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        if upright.mode.startswith("I;16"):
            grey = (np.asarray(upright) / 257).round().astype(np.uint8)
            return np.stack([grey] * 3, axis=-1)
        if upright.mode in "IF":
            raise ValueError(f"pixels of mode {upright.mode} have no known range")
        return np.array(upright.convert("RGB"))


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Return where the mask is above half of its range, bool (H, W).

    Masks come as 0 and 1, 0 and 255 or 0 and 254, as palettes, in 16 bits, and as JPEG files with
    values in between. If there are at most two values, the range ends at the larger one. Otherwise
    it ends at 1, 255 or 65535, the first of these that no value exceeds.
    """
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        # Pillow would clip values of 16 bits, 32 bits and floats if it converted them to "L".
        values = np.asarray(upright if upright.mode[0] in "IF1" else upright.convert("L"))
    largest = values.max()
    if np.isin(values, (values.min(), largest)).all():
        top = largest
    else:
        top = next((top for top in (1, 255, 65535) if largest <= top), largest)
    return values > top / 2


def check(splits: Splits) -> None:
    """Open every file of a data set.

    Raises:
        DataError: If anything is wrong. It names, with their rows, all files that are missing or
            cannot be read, masks that are empty or of another size than their image, and images
            that occur in two splits.
    """
    rows = [row for split in splits.values() for row in split]
    with ThreadPoolExecutor() as threads:
        results = list(tqdm(threads.map(check_row, rows), "checking the data", len(rows)))
    problems = [problem for found, _ in results for problem in found]

    digests = iter(results)
    first: dict[str, tuple[str, Row]] = {}
    for split, members in splits.items():
        for row in members:
            _, image_digest = next(digests)
            if image_digest is None:
                continue
            earlier_split, earlier = first.setdefault(image_digest, (split, row))
            if earlier_split != split:
                problems.append(f"{row.source}: {row.image} is also in {earlier.source}")
    if problems:
        raise DataError(problems)


def check_row(row: Row) -> tuple[list[str], str | None]:
    """Return what is wrong with a row, and the digest of the image if it can be read."""
    problems, image_digest = [], None
    image = mask = None
    try:
        image = read_image(row.image)
        image_digest = digest(row.image)
    except UNREADABLE as error:
        problems.append(f"{row.source}: image {describe(row.image, error)}")
    try:
        mask = read_mask(row.label)
    except UNREADABLE as error:
        problems.append(f"{row.source}: mask {describe(row.label, error)}")
    if mask is not None and not mask.any():
        problems.append(f"{row.source}: mask {row.label} is empty")
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], mask.shape
        problems.append(
            f"{row.source}: {row.image} is {w} x {h} and its mask {row.label} {mask_w} x {mask_h}"
        )
    return problems, image_digest


def digest(path: Path) -> str:
    """Return a name for the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(path: Path, error: Exception) -> str:
    """Return what is wrong with a file."""
    missing = isinstance(error, FileNotFoundError)
    return f"{path} is missing" if missing else f"{path} cannot be read: {error}"


class Batch(NamedTuple):
    """Pictures as a model sees them, and their masks."""

    images: Tensor  # (B, 3, size, size)
    masks: Tensor  # (B, size, size), bool
    valid: Tensor  # (B, size, size), bool, False in the padding
    boxes: Tensor  # (B, 4), tight boxes around the masks, in pixels of the input
    index: list[int]  # place of each row in its split; a tensor would have to come from the GPU
    truths: list[Tensor]  # the masks as in their files, each (H, W), bool

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        *stacked, index, truths = self
        return Batch(*(x.to(device) for x in stacked), index, [x.to(device) for x in truths])


Sample = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]  # the parts of a batch for one image


class MaskedImages(Dataset[Sample]):
    """The rows of a split, read for a model."""

    def __init__(self, rows: list[Row], frame: Frame) -> None:
        self.rows, self.frame = rows, frame

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Return the parts of a `Batch` for one image."""
        row, frame = self.rows[index], self.frame
        mask = read_mask(row.label)
        truth = torch.from_numpy(mask)
        box = frame.boxes(masks_to_boxes(truth[None])[0], *mask.shape)
        image = frame.image(read_image(row.image))
        return image, frame.mask(mask), frame.valid(*mask.shape), box, index, truth


def loaders(
    splits: Splits, frame: Frame, batch_size: int, workers: int, order: torch.Generator
) -> tuple[DataLoader[Batch], ...]:
    """Return the loaders of training, shuffled by `order`, of validation, and of test."""
    load = partial(
        DataLoader, batch_size=batch_size, collate_fn=collate, num_workers=workers, generator=order
    )
    train, val, test = (MaskedImages(splits[split], frame) for split in SPLITS)
    return load(train, shuffle=True, drop_last=True), load(val), load(test)


def collate(samples: list[Sample]) -> Batch:
    """Stack the parts that have the same size in every sample, and list the others."""
    *stacked, index, truths = zip(*samples, strict=True)
    return Batch(*map(torch.stack, stacked), list(index), list(truths))
