"""The loss of HQ-SAM, at points that are mostly where the student is uncertain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 112**2  # a mask
OVERSAMPLING = 3
UNCERTAIN = 0.75  # share of the points that are the most uncertain of all that were drawn


def point_loss(
    logits: Tensor,
    masks: Tensor,
    valid: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the binary cross-entropy (BCE) plus the dice loss, both at points that are drawn.

    The loss is that of Ke et al., Segment Anything in High Quality, NeurIPS 2023, and the points
    are those of Kirillov et al., PointRend, CVPR 2020.

    Args:
        logits: Mask logits, shape (B, h, w).
        masks: Bool, shape (B, H, W).
        valid: Which pixels count, bool, shape (B, H, W). By default all of them do. The release
            has no such pixels.
        generator: What draws the points.
    """
    points = draw_points(logits.detach(), valid, generator)
    return sum(losses_at(points, logits, masks, valid))


def losses_at(
    points: Tensor, logits: Tensor, masks: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return BCE and dice loss at given points, each averaged over the masks.

    Args:
        points: x and y as shares of width and height, shape (B, P, 2).
        logits: As for `point_loss`, and so are the others.
        masks: Between pixels, the truth is between 0 and 1.
        valid: Points on other pixels do not count.
    """
    x = sample(logits, points)
    y = sample(masks.to(x.dtype), points)
    counts = torch.ones_like(x) if valid is None else nearest(valid, points).to(x.dtype)
    return bce_and_dice(x, y, counts)


def bce_and_dice(x: Tensor, y: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return BCE and dice loss of logits and truth at points, where those count; each (B, P)."""
    bce = F.binary_cross_entropy_with_logits(x, y, weight=counts, reduction="none")
    bce = bce.sum(dim=1) / counts.sum(dim=1).clamp(min=1)
    p, y = x.sigmoid() * counts, y * counts
    dice = 1 - (2 * (p * y).sum(dim=1) + 1) / (p.sum(dim=1) + y.sum(dim=1) + 1)
    return bce.mean(), dice.mean()


def draw_points(
    logits: Tensor, valid: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return points (B, 12544, 2): the most uncertain of three times as many, and some others."""
    device = logits.device if generator is None else generator.device

    def uniform(count: int) -> Tensor:
        drawn = torch.rand(len(logits), count, 2, generator=generator, device=device)
        return drawn.to(logits.device)

    candidates = uniform(OVERSAMPLING * POINTS)
    certainty = sample(logits, candidates.to(logits.dtype)).abs()
    if valid is not None:
        certainty = certainty.masked_fill(~nearest(valid, candidates), torch.inf)
    uncertain = int(UNCERTAIN * POINTS)
    chosen = certainty.topk(uncertain, dim=1, largest=False).indices[..., None]
    points = torch.cat([candidates.take_along_dim(chosen, dim=1), uniform(POINTS - uncertain)], 1)
    return points.to(logits.dtype)


def sample(maps: Tensor, points: Tensor, mode: str = "bilinear", outside: str = "zeros") -> Tensor:
    """Return the values of maps (B, h, w) at points (B, P, 2), shape (B, P)."""
    grid = 2 * points[:, None] - 1
    sampled = F.grid_sample(
        maps[:, None], grid, mode=mode, padding_mode=outside, align_corners=False
    )
    return sampled[:, 0, 0]


def nearest(valid: Tensor, points: Tensor) -> Tensor:
    """Return whether the pixels at points count, bool, shape (B, P)."""
    return sample(valid.to(points.dtype), points, mode="nearest", outside="border") > 0.5
