"""A Segment Anything model small enough for a laptop, made of the official, unedited classes."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn

IMAGE_SIZE, PATCH_SIZE = 256, 16
DIM = 64  # channels of image embedding and mask tokens, 256 in the released models


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
        **prompts_and_masks(grid),
    )


def prompts_and_masks(grid: int) -> dict[str, nn.Module]:
    """Return a prompt encoder and a mask decoder for an embedding of so many places a side."""
    return {
        "prompt_encoder": PromptEncoder(
            embed_dim=DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(IMAGE_SIZE, IMAGE_SIZE),
            mask_in_chans=16,
        ),
        "mask_decoder": MaskDecoder(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=128, num_heads=4),
            iou_head_hidden_dim=32,
        ),
    }


def predict(model: Sam, images: Tensor, boxes: Tensor) -> Tensor:
    """Segment one object in each picture.

    ``Sam.forward`` runs under ``no_grad``. This function calls the model's parts itself, so that
    there are gradients.

    Args:
        model: A ``Sam``; its image encoder may be wrapped by PEFT.
        images: RGB pictures, uint8, shape (B, 256, 256, 3).
        boxes: One prompt for each picture, pixels x0 y0 x1 y1, shape (B, 4).

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
        points: Pixels x y, shape (B, P, 2), and their labels, shape (B, P): 1 on the object, 0
            beside it.
    """
    sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=None)
    # The official decoder takes one image embedding and many prompts: it repeats the embedding and
    # adds the dense prompts to it. Given an embedding of zeros, and dense prompts that contain the
    # embeddings of the pictures, it decodes each picture with its own prompt. Hooks on the decoder
    # that need the embeddings themselves find them at the zeros.
    zeros = torch.zeros_like(embedding[:1])
    zeros.stands_for = embedding
    logits, _ = model.mask_decoder(
        image_embeddings=zeros,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + embedding,
        multimask_output=False,
    )
    return logits[:, 0]
