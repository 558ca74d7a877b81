"""Augmentation: image and mask stay together, and what is drawn depends on seed and row alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import assert_same_run, run, stop_and_resume

from parts.data import batches
from parts.data.augmentation import Pictures, augmented
from parts.data.batches import MaskedImages
from parts.data.frame import Frame
from parts.data.tables import read_tables

SEEDS = range(20)


def disc(height: int = 60, width: int = 90) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bright disc on dark ground, with its mask, and a corner that is not known."""
    y, x = np.mgrid[:height, :width]
    truth = (x - 30) ** 2 + (y - 40) ** 2 < 200
    rgb = np.where(truth, 220, 30).astype(np.uint8)[..., None].repeat(3, axis=-1)
    known = (x > 20) | (y > 20)
    return rgb, truth, known


@pytest.mark.parametrize("seed", SEEDS)
def test_image_and_masks_stay_together(seed: int) -> None:
    rgb, truth, known = augmented(*disc(), seed, 0)
    assert (rgb.shape, rgb.dtype, truth.dtype) == ((60, 90, 3), np.uint8, bool)
    grey = rgb.mean(axis=-1)
    bright = grey > (grey.min() + grey.max()) / 2
    assert (bright & truth).sum() > 0.98 * (bright | truth).sum()
    assert (~known).sum() < 2.5 * (~disc()[2]).sum()


def test_every_change_is_drawn() -> None:
    before = disc()
    truths = [augmented(*before, seed, 0)[1] for seed in SEEDS]
    centres = np.array([np.argwhere(truth).mean(axis=0) for truth in truths])
    assert centres[:, 0].min() < 30 < centres[:, 0].max()  # up and down
    assert centres[:, 1].min() < 45 < centres[:, 1].max()  # left and right
    assert len({int(truth.sum()) for truth in truths}) > 10  # crops of many sizes
    colours = {tuple(augmented(*before, seed, 0)[0].max(axis=(0, 1))) for seed in SEEDS}
    assert len(colours) > 10


def test_what_is_drawn_depends_on_seed_and_row_alone() -> None:
    torch.manual_seed(5)
    expected = augmented(*disc(), 3, 7)
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == drawn  # nothing of the program's own random numbers was used
    again = augmented(*disc(), 3, 7)
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
    # PyTorch's generator has 32 bits of a seed.
    for seed, row in ((4, 7), (3, 8), (3 + 2**31, 7), (7, 3)):
        assert not np.array_equal(augmented(*disc(), seed, row)[0], expected[0])


def test_an_object_is_never_lost() -> None:
    rgb, truth, known = disc()
    truth = np.zeros_like(truth)
    truth[0, 0] = True
    results = [augmented(rgb, truth, known, seed, 0) for seed in SEEDS]
    assert all(found.any() for _, found, _ in results)
    assert any(same is rgb for same, _, _ in results)


def test_boxes_and_valid_places_are_those_of_the_changed_mask(data: Path) -> None:
    images = MaskedImages(read_tables(data)["train"], Frame(256, keep_aspect=True))
    plain = images[0]
    images.seed = 1
    image, mask, _, box, _, truth, _ = images[0]
    assert not torch.equal(image, plain[0])
    places = mask.nonzero().float()
    expected = torch.cat([places.amin(0).flip(0), places.amax(0).flip(0)])
    assert (box - expected).abs().max() <= 2
    assert truth.shape == plain[5].shape


@pytest.mark.slow
def test_runs_agree_whoever_reads_and_whenever_they_stop(
    data: Path, tmp_path: Path, monkeypatch
) -> None:
    drawn = []

    def noted(*pictures_and_seeds: object) -> Pictures:
        drawn.append(pictures_and_seeds[3:])
        return augmented(*pictures_and_seeds)

    options = ["--epochs", 2, "--augment"]
    with monkeypatch.context() as patch:
        patch.setattr(batches, "augmented", noted)
        run("sam", data, tmp_path / "one", *options)
    assert len(set(drawn)) == len(drawn) == 2 * 4  # the rows of training, anew in each epoch
    stop_and_resume("sam", data, tmp_path / "stopped", [*options, "--workers", 2])
    assert_same_run(tmp_path / "one", tmp_path / "stopped", "epoch-002")
