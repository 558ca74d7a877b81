"""The structure loss of the paper's Eq. 15."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def structure_loss(
    logits: Tensor, masks: Tensor, valid: Tensor | None = None, *, legacy: bool = False
) -> Tensor:
    """Return the weighted binary cross-entropy (BCE) plus the weighted IoU loss.

    This is L_ce of Eq. 15, which comes from Fan et al., PraNet, MICCAI 2020. Pixels near the
    boundary of the mask have up to six times the weight of others.

    Args:
        logits: Mask logits, shape (B, h, w). They are scaled to the size of the masks.
        masks: Bool, shape (B, H, W).
        valid: Which pixels count, bool, shape (B, H, W). By default all of them do.
        legacy: Whether to do as the released code of the paper, where the weights of the BCE
            cancel. It is then the plain mean over batch and pixels, padding included.
    """
    if logits.shape != masks.shape:
        logits = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0]
    logits, masks = logits.float(), masks.float()
    # The mean over a square of 31 by 31 pixels is taken along one axis and then along the other,
    # which is fifteen times as fast.
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
