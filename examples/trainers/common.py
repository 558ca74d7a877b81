"""What the recipes share: a SAM with its teacher, drawn scenes, and the loss of segmentation."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import SamModel

from renyi_kd import DistilledModel, InfoSAMDistiller

sys.path += [str(Path(__file__).parents[1] / name) for name in ("finetuning", "quickstart")]

from parts.models.huggingface import tiny_sam
from scenes import endoscopy_scene

MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def parse(description: str | None, **defaults: int) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny", help="a SAM of transformers: folder, Hub id, or tiny"
    )
    for name, value in ({"steps": 3, "batch_size": 4} | defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def distilled_sam(name: str) -> DistilledModel:
    """Return a SAM with LoRA in its encoder, beside its frozen original."""
    torch.manual_seed(0)
    sam = tiny_sam() if name == "tiny" else SamModel.from_pretrained(name)
    teacher = copy.deepcopy(sam)  # before LoRA is added
    sam.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"]), sam)
    sam.mask_decoder.requires_grad_(True)
    sam.mask_decoder.iou_prediction_head.requires_grad_(False)  # the loss does not ask for it
    return DistilledModel(
        sam, teacher, InfoSAMDistiller(sam.config.mask_decoder_config.hidden_size)
    )


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return Adam for what trains."""
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=2e-4)


def loader(batch_size: int, *, first: int = 0, count: int = 64) -> DataLoader[dict[str, Tensor]]:
    """Return batches of scenes, always in the same order."""
    return DataLoader(Scenes(first, count), batch_size, drop_last=True)


class Scenes(Dataset[dict[str, Tensor]]):
    """Drawn pictures of 256 by 256 pixels, each with a box and a mask of 64 by 64."""

    def __init__(self, first: int, count: int) -> None:
        self.seeds = range(first, first + count)

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.seeds)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Return what transformers' SamModel takes, and the mask as `labels`."""
        scene = endoscopy_scene(np.random.default_rng(self.seeds[place]))
        image = torch.from_numpy((scene.image - MEAN) / DEVIATION).permute(2, 0, 1).float()
        mask = torch.from_numpy(scene.mask)[None, None].float()
        return {
            "pixel_values": image,
            "input_boxes": torch.from_numpy(scene.box)[None],
            "labels": F.avg_pool2d(mask, 4)[0, 0].round(),
        }


def losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the loss of segmentation and that of distillation, of which there may be none."""
    inputs: dict[str, Any] = {name: x for name, x in batch.items() if name != "labels"}
    output, distillation = model(**inputs, multimask_output=False)
    logits = output.pred_masks[:, 0, 0]
    return F.binary_cross_entropy_with_logits(logits, batch["labels"]), distillation


def report(step: int, segmentation: Tensor, distillation: Tensor) -> None:
    """Print the losses of a step."""
    print(f"step {step}: segmentation {segmentation:.5f}, distillation {distillation:.5f}")
