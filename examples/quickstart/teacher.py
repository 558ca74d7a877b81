"""The small teacher of the quickstart, and how well a model segments scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor
from torchmetrics.functional.classification import binary_jaccard_index

from parts.models.tiny_sam import build_tiny_sam, predict
from scenes import Scene

WEIGHTS = Path(__file__).with_name("tiny_sam.safetensors")


def load_teacher(weights: Path = WEIGHTS) -> Sam:
    """Return the model that ``pretrain_teacher.py`` trained, in eval mode and frozen."""
    model = build_tiny_sam()
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def segment(model: Sam, scenes: Scene, batch_size: int = 16) -> Tensor:
    """Return the predicted masks of all scenes, prompted with their exact boxes, bool (N, H, W)."""
    images, _, boxes = map(torch.from_numpy, scenes)
    batches = zip(images.split(batch_size), boxes.split(batch_size), strict=True)
    return torch.cat([predict(model, *batch) > 0 for batch in batches])


def ious(predictions: Tensor, scenes: Scene) -> Tensor:
    """Return the IoU of each predicted mask with the truth, shape (N,)."""
    masks = torch.from_numpy(scenes.mask)
    return torch.stack([*map(binary_jaccard_index, predictions, masks)])
