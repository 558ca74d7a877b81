"""A model's masks at the size of the images, and how well they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from finetuning.data import Batch
from finetuning.metrics import dice_and_iou
from finetuning.prompts import Prompts, draw_points
from finetuning.segmenter import Segmenter


@torch.no_grad()
def predictions(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mask logits and truth of each image, (H, W), scaled as the package's predictor does.

    Args:
        model: What segments.
        batches: Of the split.
        prompts: "boxes", the true ones, or "points", the same ones at every call.
        points: How many an image.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            asked = Prompts(batch.boxes) if prompts == "boxes" else draw_points(points, batch)
            for logits, truth in zip(model(batch.images, asked), batch.truths, strict=True):
                yield model.frame.restore(logits, *truth.shape), truth
    model.train(was_training)


def evaluate(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> dict[str, float]:
    """Return the mean IoU and Dice over the images; the arguments are those of `predictions`."""
    pairs = predictions(model, batches, prompts, points)
    scores = torch.tensor([dice_and_iou(logits > 0, truth) for logits, truth in pairs])
    dice, iou = scores.mean(0).tolist()
    return {"iou": iou, "dice": dice}
