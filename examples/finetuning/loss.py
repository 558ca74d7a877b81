"""The structure loss of the paper's Eq. 15."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def structure_loss(
    logits: Tensor, masks: Tensor, valid: Tensor | None = None, *, legacy: bool = False
) -> Tensor:
    """Return weighted BCE plus weighted IoU loss; pixels near the boundary weigh up to six times.

    L_ce of Eq. 15, from Fan et al., PraNet, MICCAI 2020.

    Args:
        logits: Mask logits, shape (B, h, w); scaled to the size of the masks.
        masks: Bool, shape (B, H, W).
        valid: What counts, bool, shape (B, H, W); everything by default.
        legacy: As in the released code of the paper, where the weights of the BCE cancel: the
            plain mean over batch and pixels, padding included.
    """
    if logits.shape != masks.shape:
        logits = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0]
    logits, masks = logits.float(), masks.float()
    # A square mean of 31 by 31 pixels, as two passes along the axes: fifteen times as fast.
    mean = F.avg_pool2d(masks, (31, 1), stride=1, padding=(15, 0))
    mean = F.avg_pool2d(mean, (1, 31), stride=1, padding=(0, 15))
    weight = 1 + 5 * (mean - masks).abs()
    if valid is not None and not legacy:
        weight = weight * valid

    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    bce = bce.mean() if legacy else (weight * bce).sum((1, 2)) / weight.sum((1, 2))
    p = logits.sigmoid()
    intersection = (weight * p * masks).sum((1, 2))
    union = (weight * (p + masks - p * masks)).sum((1, 2))
    return (bce + 1 - (intersection + 1) / (union + 1)).mean()
