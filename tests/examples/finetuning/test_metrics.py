"""The scores of an image by hand, and by the definitions in the libraries."""

import numpy as np
import pytest
import torch
from py_sod_metrics import Emeasure, Smeasure, WeightedFmeasure

from parts.evaluation.metrics import image_scores


def square(top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def logits_of(mask: torch.Tensor, strength: float = 30) -> torch.Tensor:
    return torch.where(mask, strength, -strength)


def test_a_perfect_mask() -> None:
    truth = square(5, 8, 20)
    for paper in (False, True):
        scores = image_scores(logits_of(truth), truth, paper=paper)
        # The mean E-measure has the threshold 0, at which everything is object.
        assert scores.pop("e_measure") == pytest.approx(1, abs=5e-3)
        assert scores == pytest.approx(dict.fromkeys(scores, 1), abs=1e-6)


def test_a_shifted_square() -> None:
    scores = image_scores(logits_of(square(10, 12, 20)), square(10, 10, 20))
    assert scores["iou"] == pytest.approx(360 / 440)
    assert scores["dice"] == pytest.approx(720 / 800)
    # Of the 76 boundary pixels 18 above and 18 below coincide; at a distance of 1 come those whose
    # neighbours do, two of each; at 2 all are near.
    assert scores["boundary_f1_0"] == pytest.approx(36 / 76)
    assert scores["boundary_f1_1"] == pytest.approx(40 / 76)
    assert scores["boundary_f1_2"] == scores["boundary_f1_3"] == 1


@pytest.mark.parametrize("paper", [False, True])
def test_definitions_of_the_libraries(paper: bool) -> None:
    torch.manual_seed(0)
    truth = square(5, 8, 20)
    logits = torch.nn.functional.avg_pool2d(logits_of(truth, 2)[None], 9, 1, 4)[0]
    logits = logits + 0.3 * torch.randn(40, 50)
    logits[0, 0], logits[15, 18] = -40, 40  # so that normalising pictures does not stretch them
    scores = image_scores(logits, truth, paper=paper)
    thresholds = (0.1, 0.3, 0.5, 0.7, 0.9) if paper else (0,)
    masks = [(logits > t).numpy() for t in thresholds]
    expected = truth.numpy()
    ious = [(mask & expected).sum() / (mask | expected).sum() for mask in masks]
    dices = [2 * (mask & expected).sum() / (mask.sum() + expected.sum()) for mask in masks]
    assert scores["iou"] == pytest.approx(np.mean(ious))
    assert scores["dice"] == pytest.approx(np.mean(dices))
    # PySODMetrics wants 8-bit pictures, unless told that they are probabilities.
    values = logits.clamp(0, 1) if paper else logits.sigmoid()
    picture = (255 * values.double()).round().byte().numpy()
    truth_picture = 255 * truth.byte().numpy()
    for measure, name in (
        (Smeasure(), "s_measure"),
        (Emeasure(), "e_measure"),
        (WeightedFmeasure(beta=0.3 if paper else 1), "weighted_f"),
    ):
        measure.step(picture, truth_picture, normalize=True)
        (result,) = measure.get_results().values()
        if name == "e_measure":
            result = result["adp"] if paper else result["curve"].mean()
        assert scores[name] == pytest.approx(float(result), abs=0.004), name


@pytest.mark.parametrize("paper", [False, True])
def test_background_and_foreground_alone(paper: bool) -> None:
    full, none = torch.ones(40, 50, dtype=torch.bool), torch.zeros(40, 50, dtype=torch.bool)
    truth = square(5, 8, 20)
    names = {"iou", "dice", "weighted_f", "boundary_f1_0", "boundary_f1_3"}
    for mask, right, score in (
        (none, truth, 0),
        (full, full, 1),
        (full, none, 0),
        (none, full, 0),
    ):
        scores = image_scores(logits_of(mask), right, paper=paper)
        # The E-measure divides by the number of pixels less one.
        assert all(0 <= value <= 2000 / 1999 + 1e-9 for value in scores.values()), scores
        boundary = {"boundary_f1_0", "boundary_f1_3"} if right is not truth else set()
        if right is full and mask is none:
            # It blurs the errors, and there are none beyond the border.
            assert 0 < scores["weighted_f"] < 0.3
            scores["weighted_f"] = 0
        for name in names - boundary:
            assert scores[name] == pytest.approx(score, abs=1e-6), name
        for name in boundary:  # neither has one
            assert scores[name] == 1
    scores = image_scores(logits_of(full), truth, paper=paper)
    assert scores["iou"] == pytest.approx(400 / 2000)
    assert scores["boundary_f1_3"] == 0
