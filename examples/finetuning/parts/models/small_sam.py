"""A small Segment Anything model for real pictures: the official classes on a frozen backbone."""

from __future__ import annotations

from functools import partial
from hashlib import sha256

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
MOST_SEEN = 512  # pictures, of which each takes 0.4 MB


class BackboneEmbedding(nn.Module):
    """What a frozen EfficientNet-Lite0 sees, in place of the embedding of patches.

    Its outputs at strides of 8, 16 and 32 pixels are projected, scaled to the grid and added.

    Fine-tuning shows the same few pictures again and again, and a frozen backbone makes the same of
    them each time. On a CPU this is a quarter of a step, which `remember` saves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[bytes, bool], list[Tensor]] | None = None
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
        maps = self.see(images) if self.seen is None or images.is_cuda else self.recall(images)
        projected = [
            F.interpolate(project(x), (GRID, GRID), mode="bilinear")
            for project, x in zip(self.projections, maps, strict=True)
        ]
        return sum(projected).permute(0, 2, 3, 1)

    def see(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the backbone."""
        pixels = images * self.scale + self.offset
        found: list[Tensor] = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        return found

    def recall(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the backbone, and compute those that are not in memory."""
        half = torch.is_autocast_enabled("cpu")
        names = [(sha256(image.contiguous().numpy()).digest(), half) for image in images]
        new = [i for i, name in enumerate(names) if name not in self.seen]
        if new:
            if len(self.seen) + len(new) > MOST_SEEN:
                self.seen.clear()
                new = [*range(len(names))]
            for i, *maps in zip(new, *self.see(images[new]), strict=True):
                self.seen[names[i]] = maps
        return [
            torch.stack(level) for level in zip(*(self.seen[name] for name in names), strict=True)
        ]

    def remember(self) -> None:
        """Keep what is seen from now on; the weights of the backbone must not change any more."""
        self.seen = {}


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
