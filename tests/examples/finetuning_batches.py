"""Batches of masks, as the tests of prompts and scores draw them."""

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from parts.data.batches import Batch


def batch(masks: Tensor, valid: Tensor | None = None) -> Batch:
    """Pictures of these masks, whose content does not matter."""
    valid = torch.ones_like(masks) if valid is None else valid
    images = torch.zeros(len(masks), 3, 1, 1)
    boxes = masks_to_boxes(masks)
    return Batch(images, masks, valid, boxes, list(range(len(masks))), [], [])
