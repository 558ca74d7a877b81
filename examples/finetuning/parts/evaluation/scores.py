"""A model's masks at the size of the images, and how well they fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import gather_object
from torch import Tensor

from parts.data.batches import Batch
from parts.data.prompts import Prompts, draw_points
from parts.evaluation.metrics import dice_and_iou
from parts.models.segmenter import Segmenter


@torch.no_grad()
def predictions(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield index, mask logits (H, W) and truth (H, W) of each image.

    The logits are scaled to the size of the image in the same way as by the model's own predictor.
    Where values of the mask are ignored, they are -inf, so that prediction and truth agree.

    Args:
        model: The model that segments.
        batches: The batches of a split.
        prompts: "boxes" for the true ones, or "points" for the same ones in the same batch.
        points: The number of points for each image.
    """
    was_training = model.training
    model.eval()
    for batch in batches:
        logits = model(batch.images, fixed_prompts(prompts, points, batch))
        for index, low, truth, known in zip(
            batch.index, logits, batch.truths, batch.known, strict=True
        ):
            restored = model.frame.restore(low, *truth.shape)
            yield index, restored.masked_fill(~known, -math.inf), truth
    model.train(was_training)


def fixed_prompts(kind: str, points: int, batch: Batch) -> Prompts:
    """Return the true boxes, or so many points, the same for the same batch."""
    if kind == "boxes":
        return Prompts(batch.boxes)
    with torch.random.fork_rng():
        # The first index of a batch is the same whichever process the batch comes to.
        torch.manual_seed(batch.index[0])
        return draw_points(points, batch)


def evaluate(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> dict[str, float]:
    """Return the mean IoU and Dice over the images of all processes.

    The arguments are those of `predictions`. The model must not be wrapped for several processes:
    these may have different numbers of batches, and a wrapper would wait for the others.
    """
    found = predictions(model, batches, prompts, points)
    own = [(index, dice_and_iou(logits > 0, truth)) for index, logits, truth in found]
    scores = [score for _, score in sorted(gather_object(own))]
    dice, iou = torch.tensor(scores).mean(0).tolist()
    return {"iou": iou, "dice": dice}
