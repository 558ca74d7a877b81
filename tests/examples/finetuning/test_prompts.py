"""Boxes and points that are drawn from masks."""

import pytest
import torch
from finetuning_batches import batch

from parts.data.prompts import draw_points, draw_prompts, noised


@pytest.mark.parametrize(("count", "on_object"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_points_lie_where_their_labels_say(count: int, on_object: int) -> None:
    torch.manual_seed(0)
    masks = torch.rand(4, 48, 64) < 0.1
    valid = torch.ones_like(masks)
    valid[:, 40:] = masks[:, 40:] = False
    seen = torch.zeros(48, 64)
    for _ in range(200):
        _, points, labels = draw_points(count, batch(masks, valid))
        x, y = points.long().unbind(-1)
        rows = torch.arange(4)[:, None]
        assert points.shape == (4, count, 2)
        assert torch.equal(labels, masks[rows, y, x].int())
        assert (labels.sum(1) == on_object).all()
        assert valid[rows, y, x].all()
        seen[y[0, 0], x[0, 0]] += 1
    assert (seen[masks[0]] > 0).float().mean() > 0.3  # all over the object
    assert not seen[~masks[0]].any()


def test_points_of_extreme_masks() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0] = True
    masks[1, 3, 4] = True
    _, points, labels = draw_points(5, batch(masks))
    assert labels[0].tolist() == [1] * 5
    assert labels[1].sum() == 1
    assert points[1, labels[1].bool()].tolist() == [[4.0, 3.0]]


@pytest.mark.parametrize(("size", "background"), [(1, 0), (3, 0), (1, 2), (40, 2), (40, 0)])
def test_no_point_where_values_are_ignored(size: int, background: int) -> None:
    masks, valid = (torch.zeros(1, 16, 16, dtype=torch.bool) for _ in range(2))
    masks.view(-1)[100 : 100 + size] = True
    valid.view(-1)[100 : 100 + size + background] = True
    for count in (1, 2, 5, 8):
        _, points, labels = draw_points(count, batch(masks, valid))
        x, y = points[0].long().unbind(-1)
        assert valid[0, y, x].all()
        assert torch.equal(labels[0], masks[0, y, x].int())


def test_boxes_and_mixed_prompts() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20.0, 110.0, 60.0]]).repeat(1000, 1)
    moved = (noised(boxes) - boxes).abs()
    largest = moved.amax(0)
    assert (largest <= torch.tensor([5.0, 2.0, 5.0, 2.0])).all()
    assert (largest > torch.tensor([4.9, 1.9, 4.9, 1.9])).all()

    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 4:9, 4:9] = True
    kinds = [draw_prompts("mixed", 1, batch(masks)).boxes is not None for _ in range(400)]
    assert 150 < sum(kinds) < 250
    assert draw_prompts("boxes", 1, batch(masks)).points is None
    assert draw_prompts("points", 3, batch(masks)).points.shape == (2, 3, 2)
