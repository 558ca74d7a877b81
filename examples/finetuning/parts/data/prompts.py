"""Boxes and points as a user might give them, drawn from the true masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parts.data.batches import Batch


class Prompts(NamedTuple):
    """One prompt for each picture, a box or some points, in pixels of the model's input."""

    boxes: Tensor | None = None  # (B, 4), x0 y0 x1 y1
    points: Tensor | None = None  # (B, P, 2), x y
    labels: Tensor | None = None  # (B, P), 1 on the object, 0 beside it


def noised(boxes: Tensor) -> Tensor:
    """Return the boxes (B, 4) with each side moved by up to 5 % of its length, as a user might."""
    lengths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + lengths * (torch.rand_like(boxes) - 0.5) / 10


def draw_points(count: int, batch: Batch) -> Prompts:
    """Draw `count` pixels of each picture, half of them, but at least one, on the object.

    A single point lies on the object. Of five points, with which the paper evaluates roads, two do.
    None lies in the padding or where values are ignored.
    """
    masks, valid, on = batch.masks, batch.valid, max(1, count // 2)
    drawn = []
    for region, number in ((masks, on), (valid & ~masks, count - on)):
        # A region with too few pixels is filled up from the other, so that labels are looked up.
        lottery = torch.rand(masks.shape, device=masks.device) - 1.0 * ~region - 1.0 * ~valid
        drawn.append(lottery.flatten(1).topk(number).indices)
    index = torch.cat(drawn, dim=1)
    # Where both have too few, the first point is repeated: the others are padding or ignored.
    index = torch.where(valid.flatten(1).gather(1, index), index, index[:, :1])
    labels = masks.flatten(1).gather(1, index)
    width = masks.shape[-1]
    points = torch.stack([index % width, index // width], dim=-1).float()
    return Prompts(points=points, labels=labels.int())


def draw_prompts(kind: str, points: int, batch: Batch) -> Prompts:
    """Return noised boxes or points; the kind "mixed" means either with equal chances."""
    if kind == "mixed":
        kind = "boxes" if torch.rand(()) < 0.5 else "points"
    return Prompts(noised(batch.boxes)) if kind == "boxes" else draw_points(points, batch)
