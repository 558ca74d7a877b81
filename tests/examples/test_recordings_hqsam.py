"""HQ-SAM on segment_anything's decoder against recordings of the official code.

`RECORDINGS` names the folder that they are in, by default that of this repository.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch import Tensor, nn

from parts.models.methods.hqsam import NEW, add_hq_to_decoder, attach
from parts.training.point_loss import bce_and_dice, draw_points, losses_at, sample

FOLDER = os.environ.get("RECORDINGS", Path(__file__).parents[1] / "data" / "baselines")
HEADS = 2
# Rounding in single and in double precision, relative to the largest entry.
SINGLE, DOUBLE = 1e-5, 1e-9


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with np.load(Path(FOLDER) / "hqsam.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-300)
    assert ((found.double() - expected.double()).abs().max() / scale).item() <= tolerance


def decoder_of(recorded: dict[str, Tensor]) -> MaskDecoder:
    weights = {k.removeprefix("p_"): v.double() for k, v in recorded.items() if k[:2] == "p_"}
    dim = weights["iou_token.weight"].shape[1]
    depth = sum(k.startswith("transformer.") and k.endswith("norm4.weight") for k in weights)
    layers = [k for k in weights if k.startswith("iou_prediction_head.") and "weight" in k]
    decoder = MaskDecoder(
        transformer_dim=dim,
        transformer=TwoWayTransformer(
            depth=depth,
            embedding_dim=dim,
            num_heads=HEADS,
            mlp_dim=len(weights["transformer.layers.0.mlp.lin1.weight"]),
            attention_downsample_rate=dim
            // len(weights["transformer.final_attn_token_to_image.q_proj.weight"]),
        ),
        num_multimask_outputs=len(weights["mask_tokens.weight"]) - 1,
        iou_head_depth=len(layers),
        iou_head_hidden_dim=len(weights[layers[0]]),
    )
    add_hq_to_decoder(decoder, width=len(weights["compress_vit_feat.0.weight"]))
    decoder.double().load_state_dict(weights)
    return decoder.requires_grad_(False)


def together(
    decoder: nn.Module, recorded: dict[str, Tensor], multimask: bool
) -> tuple[Tensor, ...]:
    """Decode all images in one pass, as the training does."""
    embedding, pe, sparse, dense, early = inputs(recorded)
    attach(embedding, early)
    zeros = torch.zeros_like(embedding[:1])
    zeros.stands_for = embedding
    return decode(decoder, zeros, pe, sparse, dense + embedding, multimask)


def one_by_one(
    decoder: nn.Module, recorded: dict[str, Tensor], multimask: bool
) -> tuple[Tensor, ...]:
    """Decode each image by itself, as the official predictor does."""
    embedding, pe, sparse, dense, early = inputs(recorded)
    attach(embedding, early)
    parts = [
        decode(decoder, image[None], pe, *prompts, multimask)
        for image, *prompts in zip(embedding, sparse[:, None], dense[:, None], strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def inputs(recorded: dict[str, Tensor]) -> list[Tensor]:
    names = ("image_embeddings", "image_pe", "sparse", "dense", "interm")
    return [recorded[name].double() for name in names]


def decode(decoder: nn.Module, *given: object) -> tuple[Tensor, Tensor]:
    names = ("image_embeddings", "image_pe", "sparse_prompt_embeddings")
    names += ("dense_prompt_embeddings", "multimask_output")
    return decoder(**dict(zip(names, given, strict=True)))


@pytest.mark.parametrize("way", [together, one_by_one])
def test_outputs_and_gradients(way, recorded: dict[str, Tensor]) -> None:
    decoder = decoder_of(recorded).train()
    new = {name: p for name, p in decoder.named_parameters() if name.startswith(NEW)}
    assert {f"gp_{name}" for name in new} == {name for name in recorded if name[:3] == "gp_"}
    for parameter in new.values():
        parameter.requires_grad_(True)
    masks, _ = way(decoder, recorded, False)
    assert_close(masks.detach(), recorded["masks_hq"], DOUBLE)
    (masks * recorded["c"].double()).sum().backward()
    for name, parameter in new.items():
        assert_close(parameter.grad, recorded[f"gp_{name}"], DOUBLE)

    decoder.eval()
    with torch.no_grad():
        masks, iou = way(decoder, recorded, False)
        assert_close(masks, recorded["masks_sum"], SINGLE)
        several, _ = way(decoder, recorded, True)
        assert_close(several, recorded["masks_multi"], SINGLE)
    assert_close(iou, recorded["iou"], DOUBLE)


def test_loss_at_points(recorded: dict[str, Tensor]) -> None:
    logits = recorded["loss_logits"][:, 0].double().requires_grad_(True)
    masks, points = recorded["loss_target"][:, 0], recorded["loss_points"].double()
    # The recorded logits are those of the recording rounded to single precision, which shows in
    # what is sampled. Anything else is held to more, as sampling is linear.
    sampled = sample(logits, points)
    assert_close(sampled.detach(), recorded["point_logits"], SINGLE)
    assert_close(sample(masks.double(), points), recorded["point_targets"], DOUBLE)
    for found, name in zip(losses_at(points, logits, masks), ("bce", "dice"), strict=True):
        assert_close(found.detach(), recorded[f"point_{name}"], SINGLE)

    exact = recorded["point_logits"].requires_grad_(True)
    bce, dice = bce_and_dice(exact, recorded["point_targets"], torch.ones_like(exact))
    assert_close(bce.detach(), recorded["point_bce"], DOUBLE)
    assert_close(dice.detach(), recorded["point_dice"], DOUBLE)
    (bce + dice).backward()
    sampled.backward(exact.grad)
    assert_close(logits.grad, recorded["point_g_logits"][:, 0], DOUBLE)


def test_loss_at_drawn_points(recorded: dict[str, Tensor]) -> None:
    logits = recorded["loss_logits"][:, 0]
    points = draw_points(logits, generator=torch.Generator().manual_seed(12345))
    bce, dice = losses_at(points, logits, recorded["loss_target"][:, 0])
    assert_close(bce, recorded["sampled_bce_seed12345_float32"], SINGLE)
    assert_close(dice, recorded["sampled_dice_seed12345_float32"], SINGLE)
