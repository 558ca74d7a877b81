"""The paper's metrics of one image, as they are defined or as the released program has them."""

from __future__ import annotations

from statistics import mean

import numpy as np
from numpy.typing import NDArray
from py_sod_metrics import Emeasure, Smeasure, WeightedFmeasure
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

PAPER_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
DISTANCES = (0, 1, 2, 3)  # in pixels, of the paper's Fig. 7


def dice_and_iou(mask: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the Dice coefficient and the IoU; Dice is the F1 score of the pixels."""
    return binary_f1_score(mask, truth).item(), binary_jaccard_index(mask, truth).item()


def image_scores(logits: Tensor, truth: Tensor, *, paper: bool = False) -> dict[str, float]:
    """Return all scores of an image, each of which is 1 at best.

    IoU, Dice and boundary F1 judge the mask, which is where the logits are above 0. S-measure,
    E-measure and weighted F-measure judge the probabilities; the E-measure is the mean over all
    thresholds.

    Args:
        logits: Mask logits, shape (H, W).
        truth: Bool, shape (H, W).
        paper: Whether to do as the released program of the paper. IoU and Dice are then averaged
            over thresholds from 0.1 to 0.9 on the logits. S-measure, E-measure and weighted
            F-measure judge the logits clipped to between 0 and 1, the E-measure at its adaptive
            threshold, and the weighted F-measure with a beta of 0.3.
    """
    logits, truth = logits.float().cpu(), truth.cpu()
    thresholds = PAPER_THRESHOLDS if paper else (0.0,)
    dice, iou = map(mean, zip(*(dice_and_iou(logits > t, truth) for t in thresholds), strict=True))
    scores = {"iou": iou, "dice": dice}
    values = (logits.clamp(0, 1) if paper else logits.sigmoid()).double().numpy()
    expected, mask = truth.numpy(), (logits > 0).numpy()
    measures = Smeasure(), Emeasure(), WeightedFmeasure(0.3 if paper else 1)
    for measure in measures:
        measure.step(values, expected, normalize=False)
    s, e, f = (measure.get_results() for measure in measures)
    scores["s_measure"] = float(s["sm"])
    scores["e_measure"] = float(e["em"]["adp"] if paper else e["em"]["curve"].mean())
    scores["weighted_f"] = float(f["wfm"])
    for distance, score in zip(DISTANCES, boundary_f1(mask, expected), strict=True):
        scores[f"boundary_f1_{distance}"] = score
    return scores


def boundary_f1(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> list[float]:
    """Return the F1 score of the boundary's pixels for each of `DISTANCES`.

    A pixel of one boundary counts as right if the other boundary is no further away than the
    distance. The boundary of a mask consists of its pixels with a neighbour above, below, left or
    right that is in the image but not in the mask. Two masks without a boundary agree completely.
    """
    edges = [m & ~binary_erosion(m, border_value=1) for m in (mask, truth)]
    if not all(edge.any() for edge in edges):
        return [float(not any(edge.any() for edge in edges))] * len(DISTANCES)
    apart = [
        distance_transform_edt(~other)[edge]
        for edge, other in zip(edges, reversed(edges), strict=True)
    ]
    scores = []
    for distance in DISTANCES:
        precision, recall = (float((d <= distance).mean()) for d in apart)
        found = precision + recall
        scores.append(2 * precision * recall / found if found else 0.0)
    return scores
