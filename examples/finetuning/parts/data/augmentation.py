"""Random changes of training images, by torchvision, the same for an image and its mask."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

Mask = NDArray[np.bool_]
Pictures = tuple[NDArray[np.uint8], Mask, Mask]

SMALLEST = 0.5  # share of an image that a crop keeps
STRETCH = 3 / 4  # how far a crop may be stretched along one axis, to be of the size of the image


def augmented(rgb: NDArray[np.uint8], truth: Mask, known: Mask, seed: int, row: int) -> Pictures:
    """Flip, crop and recolour an image, and flip and crop its masks alike.

    Args:
        rgb: The image, (H, W, 3).
        truth: Its mask, (H, W).
        known: Where the values of the mask are not ignored, (H, W).
        seed: That of the epoch.
        row: The number of the row. What is drawn depends on the two alone, and on no process.

    Returns:
        The same of the same sizes. If the crop has nothing of the object, they are as they were.
    """
    height, width = truth.shape
    shape = width / height
    move = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomResizedCrop(
                (height, width), scale=(SMALLEST, 1), ratio=(shape * STRETCH, shape / STRETCH)
            ),
        ]
    )
    recolour = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    # As channels of one picture: torchvision scales what it knows as a mask by the nearest pixel to
    # the left and above, which is half a pixel beside the image.
    layers = torch.from_numpy(np.dstack([rgb, 255 * truth, 255 * known]).astype(np.uint8))
    with torch.random.fork_rng(devices=[]):
        # A generator of PyTorch has 32 bits of a seed, so that the two have to be mixed.
        torch.manual_seed(int(np.random.SeedSequence([seed, row]).generate_state(1)[0]))
        moved = move(layers.permute(2, 0, 1))
        image = recolour(moved[:3])
    found, seen = (moved[3:] > 127).numpy()
    if not found.any():
        return rgb, truth, known
    return image.permute(1, 2, 0).contiguous().numpy(), found, seen
