"""From pictures of any size to the square that a model sees, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Frame:
    """How a model wants its input: SAM keeps the aspect ratio and pads, SAM2 does not.

    The results are those of the packages' own preprocessing. The released code of the paper reads
    BGR instead, and pads before it normalises, which the models were not trained on.

    Args:
        size: Side of the square in pixels.
        keep_aspect: Whether to scale the longest side to `size` and to pad right and below, as SAM
            does. Otherwise each axis is scaled to `size`, as SAM2 does.
        mean: Of the pixels, from 0 to 1, in red, green and blue, by default ImageNet's.
        std: Their standard deviation.
    """

    size: int
    keep_aspect: bool
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def extent(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that a picture has within the square."""
        if not self.keep_aspect:
            return self.size, self.size
        scale = self.size / max(height, width)
        # A strip of a few pixels by thousands keeps a row.
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def image(self, rgb: NDArray[np.uint8]) -> Tensor:
        """Return the normalised picture, (H, W, 3) to (3, size, size)."""
        extent = [*self.extent(*rgb.shape[:2])]
        # SAM scales the picture in 8 bits, SAM2 in floating point; their rounding differs.
        if self.keep_aspect:
            pixels = TF.to_tensor(TF.resize(TF.to_pil_image(rgb), extent))
        else:
            pixels = TF.resize(TF.to_tensor(rgb), extent, antialias=True)
        return self._padded(TF.normalize(pixels, self.mean, self.std))

    def mask(self, mask: NDArray[np.bool_]) -> Tensor:
        """Return the mask, bool (H, W) to (size, size); padding is background.

        A pixel belongs to the scaled mask if the mask covers more than half as much of it as of the
        pixel that is covered most. For most masks, which cover some pixel completely, this is more
        than half of the pixel. A mask too thin for that does not vanish.
        """
        scaled = F.interpolate(
            torch.from_numpy(mask)[None, None].float(), self.extent(*mask.shape), mode="area"
        )
        return self._padded(scaled[0, 0] > scaled.max() / 2)

    def valid(self, height: int, width: int) -> Tensor:
        """Return which pixels of the square are not padding, bool (size, size)."""
        return self._padded(torch.ones(self.extent(height, width), dtype=torch.bool))

    def boxes(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Return boxes x0 y0 x1 y1, (..., 4), in pixels of the square."""
        new_height, new_width = self.extent(height, width)
        x, y = new_width / width, new_height / height
        return boxes * boxes.new_tensor([x, y, x, y])

    def restore(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Return mask logits (h, w) of the square at the size of the picture, (H, W)."""
        logits = logits[None, None].float()
        if self.keep_aspect:
            logits = F.interpolate(logits, (self.size, self.size), mode="bilinear")
            new_height, new_width = self.extent(height, width)
            logits = logits[..., :new_height, :new_width]
        return F.interpolate(logits, (height, width), mode="bilinear")[0, 0]

    def _padded(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.pad(x, (0, self.size - width, 0, self.size - height))
