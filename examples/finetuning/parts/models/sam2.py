"""The models of sam2."""

from __future__ import annotations

from pathlib import Path

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.models.segmenter import Segmenter, load_weights

TINY = [  # what makes sam2.1_hiera_t small enough for a laptop
    "++model.image_size=256",
    "++model.num_maskmem=0",
    "++model.memory_attention.num_layers=1",
    "++model.image_encoder.trunk.embed_dim=32",
    "++model.image_encoder.trunk.stages=[1,1,2,1]",
    "++model.image_encoder.trunk.global_att_blocks=[3]",
    "++model.image_encoder.neck.backbone_channel_list=[256,128,64,32]",
]


class SegmentAnything2(Segmenter):
    """`SAM2Base`, used for single pictures and not for videos."""

    model: SAM2Base
    decodes_embedding_alone = False

    @property
    def encoder(self) -> nn.Module:
        """The image encoder."""
        return self.model.image_encoder

    @property
    def decoder(self) -> nn.Module:
        """The mask decoder."""
        return self.model.sam_mask_decoder

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.encoder.trunk.blocks

    @property
    def stages(self) -> list[int]:
        """The last block of each stage, after which maps become smaller and wider."""
        return list(self.encoder.trunk.stage_ends)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return two finer levels and the image embedding of images (B, 3, size, size)."""
        *fine, embedding = self.model.forward_image(images)["backbone_fpn"]
        return [*fine, embedding]

    def decode(self, levels: list[Tensor], prompts: Prompts) -> Tensor:
        """Return mask logits (B, h, w), given one prompt for each image."""
        model, (*fine, embedding) = self.model, levels
        if not fine:
            batch, dim, height, width = embedding.shape
            fine = [
                embedding.new_zeros(batch, dim // 8, 4 * height, 4 * width),
                embedding.new_zeros(batch, dim // 4, 2 * height, 2 * width),
            ]
        if model.directly_add_no_mem_embed:
            embedding = embedding + model.no_mem_embed.mT[..., None]
        points, labels = prompts.points, prompts.labels
        if prompts.boxes is not None:
            # The package's own predictor gives boxes to the model as points of the labels 2 and 3.
            points = prompts.boxes.unflatten(1, (2, 2))
            labels = torch.tensor([[2, 3]], device=points.device).expand(len(points), 2)
        sparse, dense = model.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)
        masks, *_ = model.sam_mask_decoder(
            image_embeddings=embedding,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=False,
            high_res_features=fine,
        )
        return masks[:, 0]


def build(name: str, checkpoint: Path | None) -> SegmentAnything2:
    """Return the model with the weights of the checkpoint, or with random ones if there is none."""
    version, size = name.split("_")[0], name.removeprefix("sam2.1_").removeprefix("sam2_")
    if name == "tiny":
        version, size = "sam2.1", "hiera_t"
    # Postprocessing would replace the first mask, which is the one that trains, where another looks
    # more stable.
    model = build_sam2(
        f"configs/{version}/{version}_{size}.yaml",
        device="cpu",
        apply_postprocessing=False,
        hydra_overrides_extra=TINY if name == "tiny" else [],
    )
    if checkpoint is not None:
        load_weights(model, checkpoint, name, key="model")
    frame = Frame(model.image_size, keep_aspect=False)
    return SegmentAnything2(model, frame, model.sam_prompt_encoder.embed_dim)
