"""A Segment Anything model small enough for a laptop, made of the official, unedited classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_jaccard_index

from scenes import Scene

WEIGHTS = Path(__file__).with_name("tiny_sam.safetensors")
IMAGE_SIZE, PATCH_SIZE = 256, 16
DIM = 64  # of image embedding and mask tokens; 256 in the released models


def build_tiny_sam() -> Sam:
    """Return an untrained model of 0.7 million parameters for pictures of 256 by 256 pixels."""
    grid = IMAGE_SIZE // PATCH_SIZE
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=96,
            depth=5,
            num_heads=3,
            mlp_ratio=2.5,
            out_chans=DIM,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=8,
            global_attn_indexes=(1, 4),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(IMAGE_SIZE, IMAGE_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=128, num_heads=4),
            iou_head_hidden_dim=32,
        ),
    )


def load_teacher(weights: Path = WEIGHTS) -> Sam:
    """Return the model trained by ``pretrain_teacher.py``, in eval mode and frozen."""
    model = build_tiny_sam()
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


def predict(model: Sam, images: Tensor, boxes: Tensor) -> Tensor:
    """Segment one object in each picture.

    ``Sam.forward`` is switched to ``no_grad``; calling the parts gives gradients.

    Args:
        model: A ``Sam``, as it is or with a PEFT-wrapped image encoder.
        images: RGB pictures, uint8, shape (B, 256, 256, 3).
        boxes: One prompt a picture, pixels x0 y0 x1 y1, shape (B, 4).

    Returns:
        Mask logits, shape (B, 256, 256).
    """
    pixels = images.permute(0, 3, 1, 2).float()
    embedding = model.image_encoder((pixels - model.pixel_mean) / model.pixel_std)
    logits = decode(model, embedding, boxes=boxes)[:, None]
    return nn.functional.interpolate(logits, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")[:, 0]


def decode(
    model: Sam,
    embedding: Tensor,
    *,
    boxes: Tensor | None = None,
    points: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return low-resolution mask logits (B, h, w), one prompt for each image embedding.

    Args:
        model: A ``Sam``.
        embedding: Image embeddings, shape (B, D, h, w).
        boxes: Pixels x0 y0 x1 y1, shape (B, 4).
        points: Pixels x y, shape (B, P, 2), and labels, 1 on the object, shape (B, P).
    """
    sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=None)
    # The decoder repeats one embedding over all prompts, then adds the dense prompt to it: a zero
    # embedding, and the pictures' own embeddings as part of the dense prompt, pair them off.
    logits, _ = model.mask_decoder(
        image_embeddings=torch.zeros_like(embedding[:1]),
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embedding,
        multimask_output=False,
    )
    return logits[:, 0]


@torch.no_grad()
def segment(model: Sam, scenes: Scene, batch_size: int = 16) -> Tensor:
    """Return the predicted masks of all scenes, prompted with their exact boxes, bool (N, H, W)."""
    images, _, boxes = map(torch.from_numpy, scenes)
    batches = zip(images.split(batch_size), boxes.split(batch_size), strict=True)
    return torch.cat([predict(model, *batch) > 0 for batch in batches])


def ious(predictions: Tensor, scenes: Scene) -> Tensor:
    """Return the IoU of each predicted mask with the truth, shape (N,)."""
    masks = torch.from_numpy(scenes.mask)
    return torch.stack([*map(binary_jaccard_index, predictions, masks)])
