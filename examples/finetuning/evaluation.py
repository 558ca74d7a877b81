"""IoU and Dice of a model, at the size of the images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from finetuning.data import Batch
from finetuning.prompts import Prompts, draw_points
from finetuning.segmenter import Segmenter


@torch.no_grad()
def evaluate(
    model: Segmenter, batches: Iterable[Batch], prompts: str, points: int
) -> dict[str, float]:
    """Return the mean IoU and Dice over the images.

    Masks are the logits above 0, scaled to each image as the package's predictor does.

    Args:
        model: What segments.
        batches: Of the split.
        prompts: "boxes", the true ones, or "points", the same ones at every call.
        points: How many an image.
    """
    was_training = model.training
    model.eval()
    scores = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            asked = Prompts(batch.boxes) if prompts == "boxes" else draw_points(points, batch)
            for logits, truth in zip(model(batch.images, asked), batch.truths, strict=True):
                mask = model.frame.restore(logits, *truth.shape) > 0
                # The Dice coefficient of two masks is the F1 score of their pixels.
                scores.append([binary_jaccard_index(mask, truth), binary_f1_score(mask, truth)])
    model.train(was_training)
    iou, dice = torch.tensor(scores).mean(0).tolist()
    return {"iou": iou, "dice": dice}
