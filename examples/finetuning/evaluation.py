"""A model's masks at the size of the images, and how well they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import gather_object
from torch import Tensor

from finetuning.data import Batch
from finetuning.metrics import dice_and_iou
from finetuning.prompts import Prompts, draw_points
from finetuning.segmenter import Segmenter


@torch.no_grad()
def predictions(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield index, mask logits and truth, (H, W), of each image, scaled as its predictor does.

    Args:
        model: What segments.
        batches: Of the split.
        prompts: "boxes", the true ones, or "points", the same ones in the same batch.
        points: How many an image.
    """
    was_training = model.training
    model.eval()
    for batch in batches:
        logits = model(batch.images, fixed_prompts(prompts, points, batch))
        for index, of_image, truth in zip(batch.index, logits, batch.truths, strict=True):
            yield index, model.frame.restore(of_image, *truth.shape), truth
    model.train(was_training)


def fixed_prompts(kind: str, points: int, batch: Batch) -> Prompts:
    """Return the true boxes, or so many points, the same for the same batch."""
    if kind == "boxes":
        return Prompts(batch.boxes)
    with torch.random.fork_rng():
        torch.manual_seed(batch.index[0])  # however the batches are shared out
        return draw_points(points, batch)


def evaluate(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> dict[str, float]:
    """Return the mean IoU and Dice over the images, those of all processes.

    The arguments are those of `predictions`; the model is not wrapped, as the processes may have
    different numbers of batches.
    """
    found = predictions(model, batches, prompts, points)
    own = [(index, dice_and_iou(logits > 0, truth)) for index, logits, truth in found]
    scores = [score for _, score in sorted(gather_object(own))]
    dice, iou = torch.tensor(scores).mean(0).tolist()
    return {"iou": iou, "dice": dice}
