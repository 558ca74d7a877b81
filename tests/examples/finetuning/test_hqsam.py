"""HQ-SAM: what is added to a SAM, when its masks are whose, its files, and its loss."""

import copy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import build
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor, nn
from transformers import SamHQConfig, SamHQModel

from parts.data.prompts import Prompts
from parts.errors import InputError
from parts.models import huggingface
from parts.models.adaptation import adapt, load_trainable_state, trainable_state
from parts.models.methods.hqsam import NEW, add_hq, load_hq, new_layers
from parts.models.segmenter import Segmenter
from parts.models.tiny_sam import build_tiny_sam
from parts.runs.trained import export, load_adapters
from parts.training import point_loss as points_of
from parts.training.point_loss import draw_points, point_loss, sample

FAMILIES = ["sam", "transformers-sam"]
# The new layers' names in the HQ-SAM of transformers.
THEIRS = {
    "hf_token": "hq_token",
    "hf_mlp.layers.0": "hq_mask_mlp.proj_in",
    "hf_mlp.layers.1": "hq_mask_mlp.layers.0",
    "hf_mlp.layers.2": "hq_mask_mlp.proj_out",
} | {
    f"{own}.{i}": f"{their}_{part}"
    for own, their in zip(NEW[2:], ("compress_vit", "encoder", "mask"), strict=True)
    for i, part in {0: "conv1", 1: "norm", 3: "conv2"}.items()
}


def hq_student(family: str, seed: int = 0) -> Segmenter:
    student = build(family)
    torch.manual_seed(seed)
    adapt(student, "hq-sam", targets=["qkv"])
    return student.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# --- what is added -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [768, 1024, 1280])
def test_counts_are_those_of_the_release(width: int) -> None:
    expected = {768: 1_071_104, 1024: 1_333_248, 1280: 1_595_392}[width]
    with torch.device("meta"):
        layers = nn.ModuleDict(new_layers(width, 256))
    assert sum(p.numel() for p in layers.parameters()) == expected


def test_all_that_trains_of_vit_b() -> None:
    with torch.device("meta"):
        model = sam_model_registry["vit_b"]().requires_grad_(False)
    add_hq(model.image_encoder, model.mask_decoder)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trains.values()) == 1_071_104
    assert {p.device.type for p in trains.values()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_parameters_train_alone(family: str, inputs) -> None:
    images, boxes, *_ = inputs
    official = set(build(family).state_dict())
    student = hq_student(family).train()
    new = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert set(new) == set(student.state_dict()) - official
    assert {name.split(".")[2] for name in new} == set(NEW)
    assert all(name.startswith("model.mask_decoder.") for name in new)
    student(images, Prompts(boxes)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in new.values())
    assert all(p.grad is None for p in student.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", ["sam2", "transformers-sam2"])
def test_a_sam2_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="--method hq-sam must have the image encoder of a SAM,"):
        adapt(build(family), "hq-sam", targets=["qkv"])


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_has_the_hq_mask_and_evaluation_the_sum(family: str, inputs) -> None:
    images, boxes, *_ = inputs
    student = hq_student(family)
    both = student(images, Prompts(boxes))
    hq = student.train()(images, Prompts(boxes))
    assert hq.shape == both.shape
    last = student.decoder.hf_mlp.layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    assert not student(images, Prompts(boxes)).any()
    sam = student.eval()(images, Prompts(boxes))
    close(both, sam + hq)
    assert sam.abs().max() > 0.1 * hq.abs().max()
    # What SAM itself says is changed by the token, which takes part in its attention.
    assert not torch.equal(sam, build(family)(images, Prompts(boxes)))


@torch.no_grad()
def test_masks_are_those_of_transformers(inputs) -> None:
    """Transformers has an HQ-SAM of its own, whose layers have other names."""
    images, boxes, *_ = inputs
    student = hq_student("transformers-sam")
    vision, prompt, mask = (
        getattr(student.model.config, f"{part}_config").to_dict()
        for part in ("vision", "prompt_encoder", "mask_decoder")
    )
    mask["vit_dim"] = vision["hidden_size"]
    model = SamHQModel(
        SamHQConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    ).eval()
    state = {}
    for key, value in student.model.state_dict().items():
        layer, _, part = key.removeprefix("mask_decoder.").rpartition(".")
        name = f"mask_decoder.{THEIRS[layer]}.{part}" if layer in THEIRS else key
        state[name] = value
    model.load_state_dict(state)

    # It upscales the map that goes into the transformer, with height and width exchanged. The
    # release upscales what comes out of it, as SAM does.
    def keep(module: nn.Module, _: object, output: tuple[Tensor, Tensor]) -> None:
        module.kept = output[1]

    def repair(_: object, given: tuple[Tensor]) -> tuple[Tensor]:
        keys = model.mask_decoder.transformer.kept.flatten(0, 1)
        return (keys.transpose(1, 2).reshape(given[0].shape),)

    model.mask_decoder.transformer.register_forward_hook(keep)
    model.mask_decoder.upscale_conv1.register_forward_pre_hook(repair)

    prompts = torch.stack([boxes, boxes.flip(0)], dim=1)  # two for each picture
    for multimask in (False, True):
        given = {"pixel_values": images, "input_boxes": prompts, "multimask_output": multimask}
        expected, found = model(**given), student.model(**given)
        assert found.pred_masks.shape[:3] == (2, 2, 1)
        close(found.pred_masks, expected.pred_masks[:, :, :1])
        close(found.iou_scores, expected.iou_scores[:, :, :1])


@torch.no_grad()
def test_many_prompts_with_the_official_predictor(inputs) -> None:
    images, boxes, *_ = inputs
    student = hq_student("sam")
    first, second = SamPredictor(student.model), SamPredictor(student.model)
    pixels = images.mul(50).add(120).clamp(0, 255)
    for predictor, picture in zip((first, second), pixels, strict=True):
        predictor.set_torch_image(picture[None], (256, 256))
    expected = student(student.model.preprocess(pixels)[:1].expand(2, -1, -1, -1), Prompts(boxes))
    _, _, logits = first.predict_torch(None, None, boxes, multimask_output=False)
    close(logits[:, 0], expected)
    _, iou, logits = first.predict_torch(None, None, boxes, multimask_output=True)
    assert iou.shape == logits.shape[:2] == (2, 1)
    # A mask as the only prompt, with which there are no tokens of prompts.
    _, _, logits = first.predict_torch(None, None, None, logits[:1], multimask_output=False)
    assert logits.shape == (1, 1, 64, 64)


@torch.no_grad()
def test_many_images_with_the_official_model(inputs) -> None:
    images, boxes, *_ = inputs
    student = hq_student("sam")
    pixels = images.mul(50).add(120).clamp(0, 255)
    given = [
        {"image": picture, "boxes": box[None], "original_size": (256, 256)}
        for picture, box in zip(pixels, boxes, strict=True)
    ]
    outputs = student.model(given, multimask_output=False)
    found = torch.cat([output["low_res_logits"][:, 0] for output in outputs])
    close(found, student(student.model.preprocess(pixels), Prompts(boxes)))


@torch.no_grad()
def test_a_mask_alone_as_a_prompt_in_transformers(inputs) -> None:
    images, *_ = inputs
    model = hq_student("transformers-sam").model
    masks = torch.randn(2, 1, 64, 64)
    found = model(pixel_values=images, input_masks=masks, multimask_output=False).pred_masks
    assert found.shape == (2, 1, 1, 64, 64)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_embedding_keeps_its_features(family: str, inputs) -> None:
    images, boxes, *_ = inputs
    student = hq_student(family)
    expected = student(images, Prompts(boxes))
    early, late = student.encode(images), student.encode(images.flip(0))
    assert torch.equal(student.decode(early, Prompts(boxes)), expected)
    assert torch.equal(student.decode(early, Prompts(boxes)), expected)
    assert not torch.equal(student.decode(late, Prompts(boxes)), expected)
    # A part of the batch has the features of that part.
    close(student.decode([early[-1][1:]], Prompts(boxes[1:])), expected[1:])
    with torch.inference_mode():
        assert torch.equal(student(images, Prompts(boxes)), expected)
    with pytest.raises(InputError, match="must decode what the student's image encoder returned"):
        student.decode([early[-1].clone()], Prompts(boxes))


@torch.no_grad()
def test_the_features_are_those_of_the_first_global_block(inputs) -> None:
    images, boxes, *_ = inputs
    student, outputs = hq_student("sam"), []
    blocks = student.encoder.blocks
    assert [i for i, block in enumerate(blocks) if block.window_size == 0] == [1, 4]
    blocks[1].register_forward_hook(lambda block, _, output: outputs.append(output))
    student.decoder.compress_vit_feat.register_forward_hook(
        lambda layers, given, _: outputs.append(given[0])
    )
    student(images, Prompts(boxes))
    early, compressed = outputs
    assert torch.equal(compressed, early.permute(0, 3, 1, 2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copy_has_its_own_layers(family: str, inputs) -> None:
    images, boxes, *_ = inputs
    student = hq_student(family)
    before = student(images, Prompts(boxes))
    other = copy.deepcopy(student)
    saved = trainable_state(other)
    for parameter in saved.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    changed = other(images, Prompts(boxes))
    assert not torch.equal(changed, before)
    assert torch.equal(student(images, Prompts(boxes)), before)
    load_trainable_state(student, saved)
    assert torch.equal(student(images, Prompts(boxes)), changed)


# --- files ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_student_is_a_released_file(inputs, tmp_path: Path) -> None:
    images, boxes, *_ = inputs
    student, path = hq_student("sam", seed=3), tmp_path / "hq.pth"
    expected = student(images, Prompts(boxes))
    export(student, Namespace(package="sam", model="tiny"), path)
    state = torch.load(path, weights_only=True)
    official = set(build_tiny_sam().state_dict())
    assert {name.split(".")[1] for name in state.keys() - official} == set(NEW)
    assert official < state.keys()

    model = load_adapters(build_tiny_sam(), path, "hq-sam")
    loaded = hq_student("sam", seed=4)
    assert not torch.equal(loaded(images, Prompts(boxes)), expected)
    for change in (lambda: load_hq(loaded, path), lambda: setattr(loaded, "model", model)):
        for name in NEW:
            for parameter in getattr(loaded.decoder, name).parameters():
                parameter.zero_()
        change()
        assert torch.equal(loaded(images, Prompts(boxes)), expected)


@torch.no_grad()
def test_an_exported_folder_and_a_released_file_in_transformers(inputs, tmp_path: Path) -> None:
    images, boxes, *_ = inputs
    student = hq_student("transformers-sam", seed=3)
    expected = student(images, Prompts(boxes))
    export(student, Namespace(package="huggingface", model="tiny-sam"), tmp_path / "folder")
    model = load_adapters(huggingface.tiny_sam(), tmp_path / "folder", "hq-sam")
    given = {"pixel_values": images, "input_boxes": boxes[:, None], "multimask_output": False}
    assert torch.equal(model(**given).pred_masks[:, 0, 0], expected)

    # In a released file the weights of SAM have the names of segment_anything.
    new = {f"mask_decoder.{k}": v for k, v in student.decoder.state_dict().items() if is_new(k)}
    torch.save(build_tiny_sam().state_dict() | new, tmp_path / "hq.pth")
    other = hq_student("transformers-sam", seed=4)
    load_hq(other, tmp_path / "hq.pth")
    assert torch.equal(other(images, Prompts(boxes)), expected)

    huggingface.tiny_sam().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="of this size with hq-sam, got 25 weights"):
        load_adapters(huggingface.tiny_sam(), tmp_path / "plain", "hq-sam")


def is_new(name: str) -> bool:
    return name.startswith(NEW)


def without_token(state: dict[str, Tensor]) -> object:
    return {name: value for name, value in state.items() if "hf_token" not in name}


def wider(state: dict[str, Tensor]) -> object:
    name = "mask_decoder.compress_vit_feat.0.weight"
    return state | {name: torch.ones(768, *state[name].shape[1:])}


def overflown(state: dict[str, Tensor]) -> object:
    return state | {"mask_decoder.hf_token.weight": torch.full((1, 64), torch.inf)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_token, r"must be of an HQ-SAM .* 1 weights missing, .*hf_token\.weight"),
        (wider, r"1 of another shape \(.*compress_vit_feat\.0\.weight\)"),
        (lambda state: build_tiny_sam().state_dict(), "25 weights missing, 0 unexpected"),
        (overflown, "must hold finite weights"),
        (lambda state: [1], "must hold named tensors"),
    ],
)
def test_wrong_files(
    family: str, spoil: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    student = hq_student(family)
    new = {f"mask_decoder.{k}": v for k, v in student.decoder.state_dict().items() if is_new(k)}
    torch.save(spoil(build_tiny_sam().state_dict() | new), tmp_path / "hq.pth")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(InputError, match=message) as error:
        load_hq(student, tmp_path / "hq.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


# --- the loss ------------------------------------------------------------------------------------


def test_point_loss_against_its_formula() -> None:
    torch.manual_seed(0)
    logits, masks = 3 * torch.randn(2, 16, 16, dtype=torch.float64), torch.rand(2, 48, 64) > 0.5
    found = point_loss(logits, masks, generator=torch.Generator().manual_seed(5))
    points = draw_points(logits, generator=torch.Generator().manual_seed(5))
    assert points.shape == (2, 112**2, 2)
    x, y = (bilinear(part.numpy(), points.numpy()) for part in (logits, masks.double()))
    p = 1 / (1 + np.exp(-x))
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=1)
    dice = 1 - (2 * (p * y).sum(axis=1) + 1) / ((p + y).sum(axis=1) + 1)
    assert found.item() == pytest.approx((bce + dice).mean(), rel=1e-9)


def bilinear(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values between the centres of pixels, with zeros outside."""
    height, width = maps.shape[1:]
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    x, y = points[..., 0] * width + 0.5, points[..., 1] * height + 0.5
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    v, u, row = y - i, x - j, np.arange(len(maps))[:, None]
    upper = (1 - u) * padded[row, i, j] + u * padded[row, i, j + 1]
    lower = (1 - u) * padded[row, i + 1, j] + u * padded[row, i + 1, j + 1]
    return (1 - v) * upper + v * lower


def test_three_quarters_of_the_points_are_uncertain() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 32, 32)
    points = draw_points(logits)
    certainty = sample(logits, points).abs()
    drawn = sample(logits, torch.rand(2, 37632, 2)).abs()
    count = 9408
    # They are a quarter of all that were drawn.
    quarter = drawn.quantile(0.25, dim=1)
    torch.testing.assert_close(certainty[:, :count].amax(dim=1), quarter, rtol=0.05, atol=0)
    uniform = (certainty[:, count:] > quarter[:, None]).float().mean(dim=1)
    torch.testing.assert_close(uniform, torch.full((2,), 0.75), rtol=0.05, atol=0)


def test_pixels_that_do_not_count() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 32, 32), torch.rand(2, 32, 32) > 0.5
    valid = torch.ones_like(masks)

    def loss(logits: Tensor, masks: Tensor, valid: Tensor | None) -> Tensor:
        return point_loss(logits, masks, valid, torch.Generator().manual_seed(1))

    assert torch.equal(loss(logits, masks, valid), loss(logits, masks, None))
    valid[:, 16:] = False
    before = loss(logits, masks, valid)
    points = draw_points(logits, valid)
    assert (points[:, :9408, 1] < 0.5).all()
    logits[:, 17:] = 0  # most uncertain, and next to a pixel that counts is one that does not
    masks[:, 17:] ^= True
    assert torch.equal(loss(logits, masks, valid), before)
    valid[0] = False
    assert loss(logits, masks, valid).isfinite()


def test_the_draw_is_that_of_the_generator(monkeypatch) -> None:
    monkeypatch.setattr(points_of, "POINTS", 16)
    logits = torch.randn(1, 8, 8)
    one, other = (draw_points(logits, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(one, draw_points(logits, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(one, other)
