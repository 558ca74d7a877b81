"""A small Segment Anything model for real pictures: the official classes on a frozen backbone."""

from __future__ import annotations

from functools import partial

import timm
import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, Sam
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from parts.models.tiny_sam import DIM, IMAGE_SIZE, prompts_and_masks

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
WIDTH = 192


class BackboneEmbedding(nn.Module):
    """What a frozen EfficientNet-Lite0 sees, in place of the embedding of patches.

    Its outputs at strides of 8, 16 and 32 pixels are projected, scaled to the grid and added.
    """

    def __init__(self) -> None:
        super().__init__()
        backbone = timm.create_model(
            "tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)
        )
        backbone = freeze_batch_norm_2d(backbone).requires_grad_(False)
        # Depthwise convolutions are twice as fast with channels last.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        channels = backbone.feature_info.channels()
        self.projections = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in channels)
        # From the normalisation of SAM to that of the backbone, which wants (x - 127) / 128.
        mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
        self.register_buffer("scale", std.view(3, 1, 1) / 128, persistent=False)
        self.register_buffer("offset", (mean.view(3, 1, 1) - 127) / 128, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, GRID, GRID, WIDTH) for images (B, 3, IMAGE_SIZE, IMAGE_SIZE)."""
        pixels = images * self.scale + self.offset
        maps = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        projected = [
            F.interpolate(project(x), (GRID, GRID), mode="bilinear")
            for project, x in zip(self.projections, maps, strict=True)
        ]
        return sum(projected).permute(0, 2, 3, 1)


def build_small_sam() -> Sam:
    """Return an untrained model of 4.9 million parameters, of which 2.0 million are not frozen."""
    encoder = ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=WIDTH,
        depth=4,
        num_heads=3,
        mlp_ratio=3,
        out_chans=DIM,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(1, 3),
    )
    encoder.patch_embed = BackboneEmbedding()
    # The decoder is that of the tiny model, whose weights pre-training starts from.
    return Sam(image_encoder=encoder, **prompts_and_masks(GRID))
