"""The scores of a model over several batches."""

import pytest
import torch
from finetuning_batches import batch
from torch import Tensor, nn

from parts.data.frame import Frame
from parts.evaluation.scores import evaluate, predictions


def test_scores_by_hand() -> None:
    class Fixed(nn.Module):
        frame = Frame(8, keep_aspect=False)

        def forward(self, images: Tensor, prompts: object) -> Tensor:
            logits = -torch.ones(len(images), 8, 8)
            logits[:, :4] = 1
            return logits

    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[2:6] = True  # overlaps by a third
    missed = torch.zeros(8, 8, dtype=torch.bool)
    missed[7] = True
    known = torch.ones(8, 8, dtype=torch.bool)
    one = batch(torch.ones(2, 8, 8, dtype=torch.bool))
    one = one._replace(truths=[truth, missed], known=[known, known])
    two = batch(torch.ones(1, 8, 8, dtype=torch.bool))._replace(truths=[~truth], known=[known])
    model = Fixed()
    state = torch.get_rng_state()
    scores = evaluate(model, [one, two], "points", 1)
    assert scores["iou"] == pytest.approx((1 / 3 + 0 + 1 / 3) / 3)
    assert scores["dice"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training

    # Where nothing is known, nothing counts: of both masks the same half remains.
    half = known.clone()
    half[:2] = False
    (_, logits, _), _ = predictions(model, [one._replace(known=[half, half])], "boxes", 1)
    assert torch.equal(logits > 0, half & (torch.arange(8) < 4)[:, None])
    scores = evaluate(model, [one._replace(known=[half, half])], "boxes", 1)
    assert scores["iou"] == pytest.approx((1 / 2 + 0) / 2)
