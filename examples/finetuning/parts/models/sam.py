"""The models of segment_anything."""

from __future__ import annotations

from pathlib import Path

from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.models.segmenter import Segmenter, load_weights
from parts.models.tiny_sam import build_tiny_sam, decode


class SegmentAnything(Segmenter):
    """`Sam` in its sizes ViT-B, ViT-L and ViT-H, or one of two small ones."""

    model: Sam

    @property
    def encoder(self) -> nn.Module:
        """The image encoder."""
        return self.model.image_encoder

    @property
    def decoder(self) -> nn.Module:
        """The mask decoder."""
        return self.model.mask_decoder

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.encoder.blocks

    @property
    def stages(self) -> list[int]:
        """The blocks of global attention."""
        return [i for i, block in enumerate(self.blocks) if block.window_size == 0]

    @property
    def stride(self) -> int:
        """Pixels of the input, along one axis, for each place of the image embedding."""
        return self.frame.size // self.model.prompt_encoder.image_embedding_size[0]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the image embedding (B, D, h, w) of images (B, 3, size, size)."""
        return [self.encoder(images)]

    def decode(self, levels: list[Tensor], prompts: Prompts) -> Tensor:
        """Return mask logits (B, h, w), given one prompt for each image."""
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        return decode(self.model, levels[-1], boxes=prompts.boxes, points=points)


def build(name: str, checkpoint: Path | None) -> SegmentAnything:
    """Return the model with the weights of the checkpoint, or with random ones if there is none."""
    if name == "small":
        from parts.models.small_sam import build_small_sam  # needs timm, which the others do not

        model = build_small_sam()
    else:
        model = build_tiny_sam() if name == "tiny" else sam_model_registry[name]()
    if checkpoint is not None:
        load_weights(model, checkpoint, name)
    if name == "small":
        model.image_encoder.patch_embed.remember()
    frame = Frame(model.image_encoder.img_size, keep_aspect=True)
    return SegmentAnything(model, frame, model.prompt_encoder.embed_dim)
