"""Real SAMs at small sizes with random weights, and how to run any of them."""

import warnings
from functools import partial
from importlib import import_module

import pytest
import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import Tensor, nn
from transformers import (
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVisionConfig,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VisionConfig,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VisionConfig,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
    TimmWrapperConfig,
)

SIZE = 64  # pixels; the image embeddings are SIZE / 16 wide


def tiny_sam(dim: int = 32) -> Sam:
    """`Sam` of segment_anything, `dim` channels."""
    torch.manual_seed(0)
    return (
        Sam(
            image_encoder=ImageEncoderViT(**vit(dim)),
            prompt_encoder=PromptEncoder(**prompts(dim)),
            mask_decoder=MaskDecoder(
                transformer_dim=dim,
                transformer=TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=64, num_heads=4),
                iou_head_hidden_dim=32,
            ),
        )
        .eval()
        .to(torch.get_default_device())
    )  # its constants are made on the CPU


def vit(dim: int) -> dict[str, object]:
    return {
        "img_size": SIZE,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "out_chans": dim,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "use_rel_pos": True,
        "window_size": 3,
        "global_attn_indexes": (1,),
    }


def prompts(dim: int) -> dict[str, object]:
    grid = SIZE // 16
    return {
        "embed_dim": dim,
        "image_embedding_size": (grid, grid),
        "input_image_size": (SIZE, SIZE),
        "mask_in_chans": 4,
    }


def quietly(module: str):
    """Import a module of a package that warns while it is imported; without it, skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module(module)
        except ImportError as error:
            pytest.skip(str(error))


def tiny_sam_hq(dim: int = 32) -> nn.Module:
    """`Sam` of segment_anything_hq."""
    hq = quietly("segment_anything_hq.modeling")
    torch.manual_seed(0)
    return hq.Sam(
        image_encoder=hq.ImageEncoderViT(**vit(dim)),
        prompt_encoder=hq.PromptEncoder(**prompts(dim)),
        mask_decoder=hq.MaskDecoderHQ(
            transformer_dim=dim,
            transformer=hq.TwoWayTransformer(depth=2, embedding_dim=dim, mlp_dim=64, num_heads=4),
            iou_head_hidden_dim=32,
            vit_dim=32,
        ),
    ).eval()


def tiny_sam3() -> nn.Module:
    """The tracker of sam3. Its `build_tracker` needs a GPU, and its classes do not."""
    base = quietly("sam3.model.sam3_tracker_base")
    names = "vl_combiner", "necks", "vitdet", "position_encoding"
    backbone, necks, vitdet, positions = (quietly(f"sam3.model.{name}") for name in names)
    torch.manual_seed(0)
    dim = 32
    neck = necks.Sam3DualViTDetNeck(
        position_encoding=positions.PositionEmbeddingSine(num_pos_feats=dim, normalize=True),
        d_model=dim,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        trunk=vitdet.ViT(
            img_size=SIZE,
            pretrain_img_size=SIZE,
            patch_size=16,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            norm_layer="LayerNorm",
            window_size=2,
            global_att_blocks=(1,),
            rel_pos_blocks=(),
            use_rope=True,
            retain_cls_token=False,
        ),
        add_sam2_neck=True,
    )
    memory = nn.Module()
    memory.decoder, memory.d_model = None, dim
    return base.Sam3TrackerBase(
        backbone=backbone.SAM3VLBackbone(scalp=1, visual=neck, text=None),
        transformer=memory,
        maskmem_backbone=nn.Identity(),
        image_size=SIZE,
        backbone_stride=16,
    ).eval()


def tiny_sam2(*, object_scores: bool = True) -> SAM2Base:
    """`SAM2Base` of sam2, 256 channels; without the stability fallback to another mask."""
    torch.manual_seed(0)
    overrides = [
        f"++model.image_size={SIZE}",
        "++model.num_maskmem=0",
        "++model.memory_attention.num_layers=1",
        "++model.image_encoder.trunk.embed_dim=16",
        "++model.image_encoder.trunk.stages=[1,1,2,1]",
        "++model.image_encoder.trunk.global_att_blocks=[3]",
        "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
    ]
    if not object_scores:
        overrides += [
            "++model.pred_obj_scores=false",
            "++model.pred_obj_scores_mlp=false",
            "++model.fixed_no_obj_ptr=false",
        ]
    return build_sam2(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        device=str(torch.get_default_device()),
        hydra_overrides_extra=overrides,
        apply_postprocessing=False,
    )


def tiny_hf_sam() -> SamModel:
    """`SamModel` of transformers."""
    torch.manual_seed(0)
    return SamModel(SamConfig(**hf_sam())).eval()


def tiny_hf_sam_hq() -> SamHQModel:
    """`SamHQModel` of transformers."""
    torch.manual_seed(0)
    options = hf_sam()
    options["mask_decoder_config"] |= {"vit_dim": 32}
    return SamHQModel(SamHQConfig(**options)).eval()


def hf_sam() -> dict[str, object]:
    image = {"image_size": SIZE, "patch_size": 16}
    vision = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window_size": 3,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
        "initializer_range": 0.1,
    }
    return {
        "vision_config": image | vision,
        "prompt_encoder_config": image | {"hidden_size": 32, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4},
        "initializer_range": 0.1,
    }


def tiny_hf_sam2() -> Sam2Model:
    """`Sam2Model` of transformers; without the stability fallback to another mask."""
    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        global_attention_blocks=[3],
        initializer_range=0.1,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], **LEVELS
    )
    return Sam2Model(Sam2Config(vision_config=vision, **hf_sam2())).eval()


def tiny_hf_edgetam() -> EdgeTamModel:
    """`EdgeTamModel` of transformers, on a RepViT of timm."""
    torch.manual_seed(0)
    narrow = {"embed_dim": (8, 16, 32, 64), "depth": (1, 1, 1, 1)}
    levels = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    backbone = TimmWrapperConfig(architecture="repvit_m1", model_args=levels | narrow)
    vision = EdgeTamVisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], **LEVELS
    )
    return EdgeTamModel(EdgeTamConfig(vision_config=vision, **hf_sam2())).eval()


def tiny_hf_sam3_tracker() -> Sam3TrackerModel:
    """`Sam3TrackerModel` of transformers."""
    torch.manual_seed(0)
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": SIZE,
        "initializer_range": 0.1,
    }
    vision = Sam3VisionConfig(backbone_config=backbone, scale_factors=[4.0, 2.0, 1.0], **LEVELS)
    return Sam3TrackerModel(Sam3TrackerConfig(vision_config=vision, **hf_sam2())).eval()


LEVELS = {
    "backbone_feature_sizes": [[SIZE // stride] * 2 for stride in (4, 8, 16)],
    "fpn_hidden_size": 32,
    "initializer_range": 0.1,
}


def hf_sam2() -> dict[str, object]:
    return {
        "prompt_encoder_config": {
            "hidden_size": 32,
            "image_size": SIZE,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "dynamic_multimask_via_stability": False,
        },
        "initializer_range": 0.1,
    }


def encode(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the mask decoder takes of the images: feature maps, the image embedding last."""
    if hasattr(model, "vision_encoder"):
        if not hasattr(model, "no_memory_embedding"):
            return [model.vision_encoder(images)[0]]
        *fine, coarse = model.get_image_features(images, return_dict=True).fpn_hidden_states
        levels, sizes = [*fine, coarse + model.no_memory_embedding], model.backbone_feature_sizes
    elif hasattr(model, "sam_mask_decoder"):
        _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(images))
        levels[-1] = levels[-1] + model.no_mem_embed
    else:
        return [model.image_encoder(images)]
    # (H W, B, C) -> (B, C, H, W)
    return [
        level.permute(1, 2, 0).unflatten(2, tuple(size))
        for level, size in zip(levels, sizes, strict=True)
    ]


def decode(
    model: nn.Module, levels: list[Tensor], boxes: Tensor, *, multimask_output: bool = False
) -> Tensor:
    """Low-resolution mask logits `(B, masks, h, w)`, one box `(B, 4)` an image."""
    if hasattr(model, "vision_encoder"):
        return model(
            image_embeddings=levels if len(levels) > 1 else levels[0],
            input_boxes=boxes.unsqueeze(1),
            multimask_output=multimask_output,
        ).pred_masks[:, 0]
    if hasattr(model, "sam_mask_decoder"):
        sparse, dense = model.sam_prompt_encoder(points=None, boxes=boxes, masks=None)
        return model.sam_mask_decoder(
            image_embeddings=levels[-1],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            repeat_image=len(levels[-1]) != len(boxes),
            high_res_features=levels[:-1],
        )[0]
    (embedding,) = levels
    sparse, dense = model.prompt_encoder(points=None, boxes=boxes, masks=None)
    if len(embedding) > 1:
        # This decoder repeats one image over all prompts: a batch gets in with the dense prompts.
        embedding, dense = torch.zeros_like(embedding[:1]), dense + embedding
    image_pe = model.prompt_encoder.get_dense_pe()
    return model.mask_decoder(embedding, image_pe, sparse, dense, multimask_output)[0]


def segment(
    model: nn.Module, images: Tensor, boxes: Tensor, *, multimask_output: bool = False
) -> Tensor:
    """Low-resolution mask logits `(B, masks, h, w)`, from images to masks in one go."""
    if hasattr(model, "vision_encoder"):
        return model(
            pixel_values=images, input_boxes=boxes.unsqueeze(1), multimask_output=multimask_output
        ).pred_masks[:, 0]
    return decode(model, encode(model, images), boxes, multimask_output=multimask_output)
