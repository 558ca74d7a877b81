"""Images and masks as a model sees them, in batches."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes

from parts.data.augmentation import augmented
from parts.data.frame import Frame
from parts.data.reading import TWO_VALUED, Reading, read_image, read_mask
from parts.data.tables import Row, Splits


class Batch(NamedTuple):
    """Pictures as a model sees them, and their masks."""

    images: Tensor  # (B, 3, size, size)
    masks: Tensor  # (B, size, size), bool
    valid: Tensor  # (B, size, size), bool, False in the padding and where values are ignored
    boxes: Tensor  # (B, 4), tight boxes around the masks, in pixels of the input
    index: list[int]  # place of each row in its split; a tensor would have to come from the GPU
    truths: list[Tensor]  # the masks as in their files, each (H, W), bool
    known: list[Tensor]  # False where values are ignored, each (H, W), bool

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        *stacked, index, truths, known = self
        lists = ([x.to(device) for x in part] for part in (truths, known))
        return Batch(*(x.to(device) for x in stacked), index, *lists)


Sample = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor]  # of a batch, for one image


class MaskedImages(Dataset[Sample]):
    """The rows of a split, read for a model.

    Attributes:
        seed: What random changes of the images are drawn by, or None to leave them as they are.
    """

    seed: int | None = None

    def __init__(self, rows: list[Row], frame: Frame, reading: Reading = TWO_VALUED) -> None:
        self.rows, self.frame, self.reading = rows, frame, reading

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Return the parts of a `Batch` for one row."""
        row, frame = self.rows[index], self.frame
        image, mask = read_image(row.image, self.reading), read_mask(row.label, self.reading)
        pictures = image.rgb, mask.object, mask.known
        if self.seed is not None:
            pictures = augmented(*pictures, self.seed, index)
        rgb, found, seen = pictures
        truth, known = torch.from_numpy(found), torch.from_numpy(seen)
        box = frame.boxes(masks_to_boxes(truth[None])[0], *found.shape)
        scaled = frame.mask(found)
        valid = frame.valid(*found.shape)
        if not known.all():
            # What is ignored touches the object, of which nothing may be lost.
            valid &= scaled | ~frame.mask(~seen)
        return frame.image(rgb), scaled, valid, box, index, truth, known


def loaders(
    splits: Splits,
    frame: Frame,
    reading: Reading,
    batch_size: int,
    workers: int,
    order: torch.Generator,
) -> tuple[DataLoader[Batch], ...]:
    """Return the loaders of training, shuffled by `order`, of validation, and of test."""
    load = partial(
        DataLoader, batch_size=batch_size, collate_fn=collate, num_workers=workers, generator=order
    )
    train, val, test = (MaskedImages(members, frame, reading) for members in splits.values())
    return load(train, shuffle=True, drop_last=True), load(val), load(test)


def collate(samples: list[Sample]) -> Batch:
    """Stack the parts that have the same size in every sample, and list the others."""
    *stacked, index, truths, known = zip(*samples, strict=True)
    return Batch(*map(torch.stack, stacked), list(index), list(truths), list(known))
