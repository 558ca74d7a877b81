"""The models of transformers: SAM, HQ-SAM, SAM2, EdgeTAM and the tracker of SAM3."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VisionConfig,
    SamConfig,
    SamModel,
    logging,
)

from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.errors import InputError, first_line
from parts.models.segmenter import Segmenter, check_finite
from parts.options import HUB_NAME, SMALL_TRANSFORMERS

logging.set_verbosity_error()  # what is wrong with a folder is said in one line, not in a report

# The classes by what config.json calls the model; not every version of transformers has all.
KINDS = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "edgetam": "EdgeTamModel",
    "edgetam_video": "EdgeTamModel",
    "sam3_tracker": "Sam3TrackerModel",
}
# The classes of those of them that are for videos as well.
VIDEOS = {"sam2_video": "Sam2VideoModel", "edgetam_video": "EdgeTamVideoModel"}
HALF = (0.5, 0.5, 0.5)  # mean and deviation of pixels for SAM3
# Deviation of random weights. The usual 0.02 hardly lets a signal through models so narrow.
SPREAD = 0.1


class HuggingFaceSAM(Segmenter):
    """One of `KINDS`."""

    model: Any

    @property
    def has_levels(self) -> bool:
        """Whether masks depend on finer levels as well, as those of SAM2 and what follows it."""
        return hasattr(self.model, "no_memory_embedding")

    @property
    def is_hq(self) -> bool:
        """Whether masks depend on an early layer of the image encoder as well."""
        return hasattr(self.decoder, "hq_token")

    @property
    def decodes_embedding_alone(self) -> bool:
        """Whether masks depend on the image embedding alone."""
        return not (self.has_levels or self.is_hq)

    @property
    def stride(self) -> int:
        """Pixels of the input, along one axis, for each place of the image embedding."""
        if self.has_levels:
            return self.frame.size // self.model.prompt_encoder.image_embedding_size[0]
        return self.model.config.vision_config.patch_size

    @property
    def encoder(self) -> nn.Module:
        """The image encoder."""
        return self.model.vision_encoder

    @property
    def decoder(self) -> nn.Module:
        """The mask decoder."""
        return self.model.mask_decoder

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks.

        Raises:
            InputError: If the image encoder is convolutional, as that of EdgeTAM.
        """
        trunk = self.encoder.backbone if self.has_levels else self.encoder
        for name in ("layers", "blocks"):
            if isinstance(found := getattr(trunk, name, None), nn.ModuleList):
                return found
        raise InputError(
            f"--distiller must be one that compares no blocks: the image encoder of "
            f"{type(self.model).__name__} has no transformer blocks"
        )

    @property
    def stages(self) -> list[int]:
        """The blocks of global attention; of SAM2 the last block of each stage."""
        if self.has_levels and hasattr(self.encoder.backbone, "stage_ends"):
            return list(self.encoder.backbone.stage_ends)
        return [i for i, block in enumerate(self.blocks) if block.window_size == 0]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return what else masks depend on, and then the image embedding.

        That is the finer levels, or for HQ-SAM the output of an early layer, (B, h, w, width). The
        images have the shape (B, 3, size, size).
        """
        if self.is_hq:
            output = self.encoder(images)
            return [output.intermediate_embeddings[0], output.last_hidden_state]
        if not self.has_levels:
            return [self.encoder(images)[0]]
        # get_image_embeddings does the same, but under no_grad.
        *fine, embedding = self.model.get_image_features(images, return_dict=True).fpn_hidden_states
        levels = [*fine, embedding + self.model.no_memory_embedding]
        return [
            level.permute(1, 2, 0).unflatten(2, tuple(size))  # (h w, B, D) to (B, D, h, w)
            # An encoder may have a level more, which its model leaves out as well.
            for level, size in zip(levels, self.model.backbone_feature_sizes, strict=False)
        ]

    def decode(self, levels: list[Tensor], prompts: Prompts) -> Tensor:
        """Return mask logits (B, h, w), given one prompt for each image."""
        *fine, embedding = levels
        if not fine and self.has_levels:
            batch, dim, height, width = embedding.shape
            fine = [
                embedding.new_zeros(batch, dim // 8, 4 * height, 4 * width),
                embedding.new_zeros(batch, dim // 4, 2 * height, 2 * width),
            ]
        if prompts.boxes is not None:
            asked = {"input_boxes": prompts.boxes[:, None]}
        else:
            asked = {
                "input_points": prompts.points[:, None],
                "input_labels": prompts.labels[:, None],
            }
        if self.is_hq:
            asked["intermediate_embeddings"] = fine
        embeddings = [*fine, embedding] if self.has_levels else embedding
        output = self.model(image_embeddings=embeddings, multimask_output=False, **asked)
        return output.pred_masks[:, 0, 0]


def build(name: str, _: None = None) -> HuggingFaceSAM:
    """Return the model that is saved in the folder `name`, or a small one of random weights.

    Raises:
        InputError: If the folder holds none of `KINDS`, not all of its weights, or some that are
            not finite.
    """
    if name in SMALL_TRANSFORMERS:
        model = tiny_sam() if name == "tiny-sam" else tiny_sam2()
    else:
        model = load(Path(name))
    config = model.config
    if hasattr(model.mask_decoder, "dynamic_multimask_via_stability"):
        # Otherwise the decoder replaces the first mask, which is the one that trains, where another
        # looks more stable. The config is what an exported model is built from.
        model.mask_decoder.dynamic_multimask_via_stability = False
        config.mask_decoder_config.dynamic_multimask_via_stability = False
        frame = Frame(config.prompt_encoder_config.image_size, keep_aspect=False)
        if config.model_type == "sam3_tracker":
            frame = replace(frame, mean=HALF, std=HALF)
    else:
        frame = Frame(config.vision_config.image_size, keep_aspect=True)
    return HuggingFaceSAM(model, frame, config.mask_decoder_config.hidden_size)


def downloaded(name: str, option: str) -> str:
    """Return the folder of a model of the Hub, which is downloaded if it is not in the cache.

    Any other name is returned as it is.

    Raises:
        InputError: If the model cannot be had.
    """
    if not HUB_NAME.fullmatch(name):
        return name
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # of the network, the Hub, or the disk, each of its own type
        raise InputError(
            f"{option} must be {', '.join(SMALL_TRANSFORMERS)}, a model's folder, or the name of a "
            f"model on the Hugging Face Hub that can be downloaded, got {name}: {first_line(error)}"
        ) from error


def load(folder: Path) -> PreTrainedModel:
    """Return the model of a folder as `save_pretrained` writes it, or as it is on the hub."""
    if not (folder / "config.json").is_file():
        names = ", ".join(SMALL_TRANSFORMERS)
        raise InputError(f"--model must be {names} or a model's folder, got {folder}")
    kind = KINDS.get(model_type(folder), "")
    if not hasattr(transformers, kind):
        raise InputError(
            f"--model must be one of {', '.join(KINDS)} that transformers "
            f"{transformers.__version__} has, got {folder} with a {model_type(folder)}"
        )
    model = pretrained(getattr(transformers, kind), folder)
    check_finite(model.state_dict(), f"--model must hold finite weights, got {folder}")
    return model


def model_type(folder: Path) -> str:
    """Return what transformers calls the kind of model in a folder."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    except Exception as error:  # each kind of damage raises an exception of its own type
        raise InputError(
            f"--model must hold a readable config, got {folder}: {first_line(error)}"
        ) from error


def pretrained(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Return the model of a folder in float32, with all of its weights."""
    asked: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    asked |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to be told of below
    try:
        model, loading = kind.from_pretrained(folder, **asked)
    except Exception as error:  # each kind of damage raises an exception of its own type
        raise InputError(
            f"--model must hold readable weights, got {folder}: {first_line(error)}"
        ) from error
    wrong = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    if wrong:
        raise InputError(
            f"--model must hold all weights of its config.json, got {folder}: {len(wrong)} are "
            f"missing or of another shape ({wrong[0]})"
        )
    return model


def export(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Write a trained model, and whatever else was in the folder that it came from.

    Args:
        model: The model, with LoRA merged into it.
        name: The folder that it was loaded from, or the name of a small model.
        folder: What `from_pretrained` loads, for videos as well if `name` did.
    """
    if name in SMALL_TRANSFORMERS:
        model.save_pretrained(folder)
        return
    origin = Path(name)
    kind = model_type(origin)
    if kind in VIDEOS:
        model = with_video_parts(model, pretrained(getattr(transformers, VIDEOS[kind]), origin))
    model.save_pretrained(folder)
    for path in origin.glob("*.json"):  # those of the processor
        copy = folder / path.name
        if not copy.exists() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, copy)


def with_video_parts(model: PreTrainedModel, video: PreTrainedModel) -> PreTrainedModel:
    """Return the model for videos with the weights of the one for images."""
    video.mask_decoder.dynamic_multimask_via_stability = False
    video.config.mask_decoder_config.dynamic_multimask_via_stability = False
    video.vision_encoder = model.vision_encoder  # with whatever a method has added to it
    video.load_state_dict(video.state_dict() | model.state_dict())
    return video


def tiny_sam() -> SamModel:
    """Return a small random SAM for pictures of 256 by 256 pixels."""
    image = {"image_size": 256, "patch_size": 16}
    vision = {"hidden_size": 48, "output_channels": 64, "num_hidden_layers": 2, "window_size": 7}
    vision |= {"num_attention_heads": 3, "global_attn_indexes": [1], "num_pos_feats": 32}
    vision |= {"initializer_range": SPREAD}
    return SamModel(
        SamConfig(
            vision_config=image | vision,
            prompt_encoder_config=image | {"hidden_size": 64},
            mask_decoder_config={"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4},
            initializer_range=SPREAD,
        )
    )


def tiny_sam2() -> Sam2Model:
    """Return a small random SAM2 for pictures of 256 by 256 pixels."""
    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[256, 256],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        global_attention_blocks=[3],
        initializer_range=SPREAD,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[64, 64], [32, 32], [16, 16]],
        fpn_hidden_size=64,
        initializer_range=SPREAD,
    )
    decoder = {"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4}
    prompts = {"hidden_size": 64, "image_size": 256}
    return Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )
