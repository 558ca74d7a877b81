"""The structure loss against its formula."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from parts.training.loss import structure_loss


def reference_loss(logits: np.ndarray, masks: np.ndarray, valid: np.ndarray, legacy: bool) -> float:
    losses = []
    bces = []
    for x, y, v in zip(logits, masks, valid, strict=True):
        mean = sliding_window_view(np.pad(y, 15), (31, 31)).mean((2, 3))
        weight = 1 + 5 * np.abs(mean - y)
        if not legacy:
            weight = weight * v
        bce = np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y
        bces.append(bce)
        p = 1 / (1 + np.exp(-x))
        intersection, union = (weight * p * y).sum(), (weight * (p + y - p * y)).sum()
        own = 0 if legacy else (weight * bce).sum() / weight.sum()
        losses.append(own + 1 - (intersection + 1) / (union + 1))
    return float(np.mean(losses) + (np.mean(bces) if legacy else 0))


@pytest.mark.parametrize("legacy", [False, True])
def test_structure_loss_against_its_formula(legacy: bool) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((3, 48, 64))
    masks = np.zeros((3, 48, 64), dtype=bool)
    masks[0, 10:30, 10:40] = masks[1, :, 20:] = masks[2, 5, 5] = True
    valid = np.ones_like(masks)
    valid[:, 40:] = False
    loss = structure_loss(
        torch.from_numpy(logits), *map(torch.from_numpy, (masks, valid)), legacy=legacy
    )
    expected = reference_loss(logits, masks.astype(float), valid, legacy)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count() -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 10:30, 10:30] = True
    valid = torch.ones_like(masks)
    valid[:, 50:] = False
    logits = torch.randn(2, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(structure_loss(logits, masks, valid), logits)
    assert gradient[valid].abs().min() > 0
    assert not gradient[~valid].any()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_padded_picture_has_the_loss_of_the_picture(legacy: bool) -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 30:50, 10:30] = True  # up to the padding
    valid = torch.ones_like(masks)
    valid[:, 50:] = False
    logits = torch.randn(2, 64, 64, dtype=torch.float64)
    alone = structure_loss(logits[:, :50], masks[:, :50], legacy=legacy)
    padded = structure_loss(logits, masks, valid, legacy=legacy)
    assert (abs(padded - alone) < 1e-6) != legacy


@pytest.mark.parametrize("legacy", [False, True])
def test_low_resolution_logits_are_scaled(legacy: bool) -> None:
    def bilinear(values: np.ndarray, size: int) -> np.ndarray:  # along the last axis
        low = values.shape[-1]
        places = (np.arange(size) + 0.5) * low / size - 0.5
        return np.apply_along_axis(lambda v: np.interp(places, np.arange(low), v), -1, values)

    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[:, 16:48, 16:48] = True
    logits = 3 * np.random.default_rng(0).standard_normal((2, 16, 16))
    scaled = bilinear(bilinear(logits, 64).swapaxes(1, 2), 64).swapaxes(1, 2)
    expected = reference_loss(scaled, masks.astype(float), np.ones_like(masks), legacy)
    loss = structure_loss(torch.from_numpy(logits), torch.from_numpy(masks), legacy=legacy)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
