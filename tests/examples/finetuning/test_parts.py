"""The parts of the fine-tuning scripts against the packages they stand in for."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import BUILDS, build, combinations
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import load_file, save_file
from sam2.utils.transforms import SAM2Transforms
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes
from transformers import Sam2ImageProcessor, SamImageProcessor

from parts import huggingface, sam, sam2, tiny_sam
from parts.adaptation import METHODS, adapt, add_adapters, load_trainable_state, trainable_state
from parts.data import Batch
from parts.evaluation import evaluate
from parts.frame import Frame
from parts.loss import structure_loss
from parts.prompts import Prompts, draw_points, draw_prompts, noised
from parts.segmenter import check_teacher, load_weights
from parts.trained import merge_lora

SIZE = 256
EXTENTS = [(100, 150), (330, 210), (256, 256), (37, 400)]


def rgb(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((height // 8 + 1, width // 8 + 1, 1), np.uint8))[:height, :width]


# --- frame ---------------------------------------------------------------------------------------


def frame(keep_aspect: bool):
    return Frame(SIZE, keep_aspect)


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_of_sam_is_that_of_its_predictor(extent: tuple[int, int]) -> None:
    model = build("sam").model
    image, own = rgb(*extent), frame(True)
    scaled = ResizeLongestSide(SIZE).apply_image(image)
    expected = model.preprocess(torch.from_numpy(scaled).permute(2, 0, 1).float())
    torch.testing.assert_close(own.image(image), expected, rtol=0, atol=1e-5)

    boxes = torch.tensor([[3.0, 4.0, 20.0, 31.0], [0.0, 0.0, 37.0, 37.0]])
    expected = ResizeLongestSide(SIZE).apply_boxes_torch(boxes, extent)
    torch.testing.assert_close(own.boxes(boxes, *extent), expected)

    logits = torch.randn(1, 1, 64, 64)
    expected = model.postprocess_masks(logits, own.extent(*extent), extent)
    torch.testing.assert_close(own.restore(logits[0, 0], *extent), expected[0, 0])


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_of_sam2_is_that_of_its_predictor(extent: tuple[int, int]) -> None:
    image, own = rgb(*extent), frame(False)
    transforms = SAM2Transforms(SIZE, mask_threshold=0)
    torch.testing.assert_close(own.image(image), transforms(image), rtol=0, atol=1e-5)

    boxes = torch.tensor([[3.0, 4.0, 20.0, 31.0], [0.0, 0.0, 37.0, 37.0]])
    expected = transforms.transform_boxes(boxes, normalize=True, orig_hw=extent)
    torch.testing.assert_close(own.boxes(boxes, *extent), expected.flatten(1))

    logits = torch.randn(1, 1, 64, 64)
    expected = transforms.postprocess_masks(logits, extent)
    torch.testing.assert_close(own.restore(logits[0, 0], *extent), expected[0, 0])


@pytest.mark.parametrize("extent", EXTENTS)
def test_frame_is_that_of_transformers(extent: tuple[int, int]) -> None:
    image = rgb(*extent)
    sam = SamImageProcessor(size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE})
    sam2 = Sam2ImageProcessor(size={"height": SIZE, "width": SIZE})
    for processor, keep_aspect in ((sam, True), (sam2, False)):
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        # One level of 8 bits, 1/255 over a deviation of 0.22, is 0.018: they round elsewhere.
        torch.testing.assert_close(frame(keep_aspect).image(image), expected, rtol=0, atol=0.02)


def test_masks_fall_on_their_image() -> None:
    mask = np.zeros((100, 150), dtype=bool)
    mask[20:60, 30:90] = True
    own = frame(True)
    scaled, valid = own.mask(mask), own.valid(100, 150)
    assert scaled.shape == valid.shape == (SIZE, SIZE)
    assert valid.sum() == 171 * 256
    assert not scaled[~valid].any()
    assert abs(scaled.sum() / valid.sum() - mask.mean()) < 0.01
    logits = torch.where(scaled, 8.0, -8.0)
    restored = own.restore(logits, 100, 150) > 0
    agree = (restored & torch.from_numpy(mask)).sum() / (restored | torch.from_numpy(mask)).sum()
    assert agree > 0.95


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_masks_keep_what_is_mostly_covered(keep_aspect: bool) -> None:
    mask = np.random.default_rng(0).random((2 * SIZE, 2 * SIZE)) < 0.5
    covered = mask.reshape(SIZE, 2, SIZE, 2).mean((1, 3))
    scaled = frame(keep_aspect).mask(mask)
    np.testing.assert_array_equal(scaled.numpy(), covered > 0.5)


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_thin_and_tiny_masks_do_not_vanish(keep_aspect: bool) -> None:
    line, dot = np.zeros((2, 4 * SIZE, 4 * SIZE), dtype=bool)
    line[501, 100:900] = dot[500:502, 500:502] = True
    for mask in (line, dot):
        scaled = frame(keep_aspect).mask(mask)
        assert 0 < scaled.sum() <= 202
        assert scaled[125].any()


# --- loss ----------------------------------------------------------------------------------------


def reference_loss(logits: np.ndarray, masks: np.ndarray, valid: np.ndarray, legacy: bool) -> float:
    losses = []
    bces = []
    for x, y, v in zip(logits, masks, valid, strict=True):
        mean = sliding_window_view(np.pad(y, 15), (31, 31)).mean((2, 3))
        weight = 1 + 5 * np.abs(mean - y)
        if not legacy:
            weight = weight * v
        bce = np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y
        bces.append(bce)
        p = 1 / (1 + np.exp(-x))
        intersection, union = (weight * p * y).sum(), (weight * (p + y - p * y)).sum()
        own = 0 if legacy else (weight * bce).sum() / weight.sum()
        losses.append(own + 1 - (intersection + 1) / (union + 1))
    return float(np.mean(losses) + (np.mean(bces) if legacy else 0))


@pytest.mark.parametrize("legacy", [False, True])
def test_structure_loss_against_its_formula(legacy: bool) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((3, 48, 64))
    masks = np.zeros((3, 48, 64), dtype=bool)
    masks[0, 10:30, 10:40] = masks[1, :, 20:] = masks[2, 5, 5] = True
    valid = np.ones_like(masks)
    valid[:, 40:] = False
    loss = structure_loss(
        torch.from_numpy(logits), *map(torch.from_numpy, (masks, valid)), legacy=legacy
    )
    expected = reference_loss(logits, masks.astype(float), valid, legacy)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count() -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 10:30, 10:30] = True
    valid = torch.ones_like(masks)
    valid[:, 50:] = False
    logits = torch.randn(2, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(structure_loss(logits, masks, valid), logits)
    assert gradient[valid].abs().min() > 0
    assert not gradient[~valid].any()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_padded_picture_has_the_loss_of_the_picture(legacy: bool) -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 30:50, 10:30] = True  # up to the padding
    valid = torch.ones_like(masks)
    valid[:, 50:] = False
    logits = torch.randn(2, 64, 64, dtype=torch.float64)
    alone = structure_loss(logits[:, :50], masks[:, :50], legacy=legacy)
    padded = structure_loss(logits, masks, valid, legacy=legacy)
    assert (abs(padded - alone) < 1e-6) != legacy


@pytest.mark.parametrize("legacy", [False, True])
def test_low_resolution_logits_are_scaled(legacy: bool) -> None:
    def bilinear(values: np.ndarray, size: int) -> np.ndarray:  # along the last axis
        low = values.shape[-1]
        places = (np.arange(size) + 0.5) * low / size - 0.5
        return np.apply_along_axis(lambda v: np.interp(places, np.arange(low), v), -1, values)

    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[:, 16:48, 16:48] = True
    logits = 3 * np.random.default_rng(0).standard_normal((2, 16, 16))
    scaled = bilinear(bilinear(logits, 64).swapaxes(1, 2), 64).swapaxes(1, 2)
    expected = reference_loss(scaled, masks.astype(float), np.ones_like(masks), legacy)
    loss = structure_loss(torch.from_numpy(logits), torch.from_numpy(masks), legacy=legacy)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- prompts -------------------------------------------------------------------------------------


def batch(masks: Tensor, valid: Tensor | None = None):
    valid = torch.ones_like(masks) if valid is None else valid
    return Batch(
        torch.zeros(len(masks), 3, 1, 1),
        masks,
        valid,
        masks_to_boxes(masks),
        list(range(len(masks))),
        [],
    )


@pytest.mark.parametrize(("count", "on_object"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_points_lie_where_their_labels_say(count: int, on_object: int) -> None:
    torch.manual_seed(0)
    masks = torch.rand(4, 48, 64) < 0.1
    valid = torch.ones_like(masks)
    valid[:, 40:] = masks[:, 40:] = False
    seen = torch.zeros(48, 64)
    for _ in range(200):
        _, points, labels = draw_points(count, batch(masks, valid))
        x, y = points.long().unbind(-1)
        rows = torch.arange(4)[:, None]
        assert points.shape == (4, count, 2)
        assert torch.equal(labels, masks[rows, y, x].int())
        assert (labels.sum(1) == on_object).all()
        assert valid[rows, y, x].all()
        seen[y[0, 0], x[0, 0]] += 1
    assert (seen[masks[0]] > 0).float().mean() > 0.3  # all over the object
    assert not seen[~masks[0]].any()


def test_points_of_extreme_masks() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0] = True
    masks[1, 3, 4] = True
    _, points, labels = draw_points(5, batch(masks))
    assert labels[0].tolist() == [1] * 5
    assert labels[1].sum() == 1
    assert points[1, labels[1].bool()].tolist() == [[4.0, 3.0]]


def test_boxes_and_mixed_prompts() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20.0, 110.0, 60.0]]).repeat(1000, 1)
    moved = (noised(boxes) - boxes).abs()
    largest = moved.amax(0)
    assert (largest <= torch.tensor([5.0, 2.0, 5.0, 2.0])).all()
    assert (largest > torch.tensor([4.9, 1.9, 4.9, 1.9])).all()

    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[:, 4:9, 4:9] = True
    kinds = [draw_prompts("mixed", 1, batch(masks)).boxes is not None for _ in range(400)]
    assert 150 < sum(kinds) < 250
    assert draw_prompts("boxes", 1, batch(masks)).points is None
    assert draw_prompts("points", 3, batch(masks)).points.shape == (2, 3, 2)


# --- adaptation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    boxes = torch.tensor([[30.0, 40.0, 150.0, 200.0], [90.0, 20.0, 240.0, 100.0]])
    points, labels = torch.tensor([[[90.0, 90.0]], [[150.0, 60.0]]]), torch.ones(2, 1).int()
    return torch.randn(2, 3, SIZE, SIZE), boxes, points, labels


def intended(method: str, encoder: nn.Module) -> set[str]:
    """What should train of an encoder, by the names of its layers before they are adapted."""
    layers = [name for name, _ in encoder.named_modules()]
    qkv = [name for name in layers if name.endswith(".qkv")]
    behind = [f"{name}.adapter" for name in layers if name.endswith((".attn", ".mlp"))]
    return {
        "lora": {f"{name}.lora_{factor}.default.weight" for name in qkv for factor in "AB"},
        "lora-heads": {f"{name}.heads.{factor}" for name in qkv for factor in ("down", "up")},
        "adapter": {
            f"{name}.{layer}.{part}"
            for name in behind
            for layer in ("down", "up")
            for part in ("weight", "bias")
        },
        "bitfit": {name for name, _ in encoder.named_parameters() if name.endswith(".bias")},
        "decoder": set(),
    }[method]


def first_or_adapter(family: str, method: str) -> bool:
    """Adapters are where the packages differ: their attention returns a tensor, or a tuple."""
    return family == "sam" or method == "adapter"


@pytest.mark.parametrize(("family", "method"), combinations(METHODS, first_or_adapter))
@torch.no_grad()
def test_adaptation(family: str, method: str, inputs) -> None:
    image, box, point, label = (part[:1] for part in inputs)

    def masks(model: nn.Module) -> Tensor:
        levels = model.encode(image)  # one pass for both prompts, as it takes most of the time
        prompts = Prompts(box), Prompts(points=point, labels=label)
        return torch.cat([model.decode(levels, prompt) for prompt in prompts])

    teacher = build(family)
    before = masks(teacher)
    assert before.shape == (2, SIZE // 4, SIZE // 4)
    assert not torch.equal(*before)
    student = copy.deepcopy(teacher)
    adapt(student, method, targets=["qkv"])
    student.eval()
    # The student starts as the teacher, to the bit.
    assert torch.equal(masks(student), before)

    trains = {name for name, p in student.encoder.named_parameters() if p.requires_grad}
    assert trains == intended(method, teacher.encoder)
    assert bool(trains) == (method != "decoder")
    heads = ("iou_prediction_head.", "pred_obj_score_head.")
    for name, parameter in student.decoder.named_parameters():
        assert parameter.requires_grad != name.startswith(heads), name
    others = set(student.model.parameters()) - {*student.encoder.parameters()}
    others -= {*student.decoder.parameters()}
    assert not any(p.requires_grad for p in others)

    # A copy has its own adapters, and takes over what was saved.
    other = copy.deepcopy(student)
    saved = trainable_state(other)
    for parameter in saved.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    changed = masks(other)
    assert not torch.equal(changed, before)
    assert torch.equal(masks(student), before)
    load_trainable_state(student, saved)
    assert torch.equal(masks(student), changed)
    assert torch.equal(masks(teacher), before)


@pytest.mark.parametrize("family", BUILDS)
@torch.no_grad()
def test_added_layers_follow_their_formulas(family: str) -> None:
    rank, students = 3, {}
    for method in METHODS:
        students[method] = build(family)
        adapt(students[method], method, rank=rank, targets=["qkv"])
    encoders = {method: student.encoder.double() for method, student in students.items()}
    for parameter in (p for e in encoders.values() for p in e.parameters() if p.requires_grad):
        parameter.normal_()
    blocks = {
        method: next(m for m in encoder.modules() if hasattr(m, "attn"))
        for method, encoder in encoders.items()
    }
    plain = blocks["decoder"]
    x = torch.randn(2, 8, 8, plain.attn.qkv.in_features, dtype=torch.float64)
    width = plain.attn.qkv.out_features // 3

    lora = blocks["lora"].attn.qkv
    down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert len(down) == rank
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + x @ down.T @ up.T)

    # Query, key and value of each head, each with its own pair of factors.
    lora = blocks["lora-heads"].attn.qkv
    count = getattr(plain.attn, "num_heads", None) or plain.attn.num_attention_heads
    assert lora.heads.down.shape == (3 * count, rank, x.shape[-1])
    assert lora.heads.up.shape == (3 * count, width // count, rank)
    pairs = zip(lora.heads.down, lora.heads.up, strict=True)
    added = torch.cat([x @ down.T @ up.T for down, up in pairs], dim=-1)
    torch.testing.assert_close(lora(x), plain.attn.qkv(x) + added)

    adapter = blocks["adapter"].mlp.adapter
    x = torch.randn(2, 8, 8, adapter.down.in_features, dtype=torch.float64)
    assert adapter.down.out_features == x.shape[-1] // 4
    before = plain.mlp(x)
    after = before + adapter.up(nn.GELU()(adapter.down(before)))
    torch.testing.assert_close(blocks["adapter"].mlp(x), after)


@pytest.mark.parametrize("family", BUILDS)
def test_one_prompt_for_each_of_many_pictures(family: str, inputs) -> None:
    images, boxes, points, labels = inputs
    model = build(family)
    with torch.no_grad():
        for prompts in (Prompts(boxes), Prompts(points=points, labels=labels)):
            together = model(images, prompts)
            for i in range(2):
                own = Prompts(*(part if part is None else part[i : i + 1] for part in prompts))
                alone = model(images[i : i + 1], own)[0]
                torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["transformers-sam", "transformers-sam2"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, inputs) -> None:
    images, boxes, points, labels = inputs
    model = build(family)
    if family == "transformers-sam2":
        model.model.no_memory_embedding.normal_()  # zero in a new model
    asked = [
        (Prompts(boxes), {"input_boxes": boxes[:, None]}),
        (
            Prompts(points=points, labels=labels),
            {"input_points": points[:, None], "input_labels": labels[:, None]},
        ),
    ]
    for prompts, keywords in asked:
        output = model.model(pixel_values=images, multimask_output=False, **keywords)
        torch.testing.assert_close(model(images, prompts), output.pred_masks[:, 0, 0])


@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_merged_state_is_official(family: str) -> None:
    student, official = build(family), build(family).state_dict()
    adapt(student, "lora", targets=["qkv", "proj"])  # there is a convolution of the latter name
    merge_lora(student)
    assert student.state_dict().keys() == official.keys()


def test_adapters_are_where_the_model_is() -> None:
    encoder = build("sam").encoder.to("meta")
    assert add_adapters(encoder) > 0
    assert {p.device.type for p in encoder.parameters()} == {"meta"}


def test_half_precision_folder_trains_in_float32(tmp_path: Path) -> None:
    huggingface.tiny_sam().half().save_pretrained(tmp_path)
    student = huggingface.build(str(tmp_path))
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_wrong_state_is_refused() -> None:
    lora, decoder = build("sam"), build("sam")
    adapt(lora, "lora", targets=["qkv"])
    adapt(decoder, "decoder", targets=["qkv"])
    with pytest.raises(ValueError, match="adapted in the same way"):
        load_trainable_state(lora, trainable_state(decoder))


@pytest.mark.parametrize("family", BUILDS)
def test_targets_that_match_nothing(family: str) -> None:
    with pytest.raises(ValueError, match=r"no match\. Its linear layers are called .*qkv"):
        adapt(build(family), "lora", targets=["query", "value"])


# --- checkpoints of the packages -----------------------------------------------------------------


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(path: Path) -> None:
    weights = torch.load(path)
    weights.pop(next(iter(weights)))
    torch.save(weights, path)


def reshape(path: Path) -> None:
    weights = torch.load(path)
    name = next(key for key, value in weights.items() if value.ndim == 2)
    torch.save(weights | {name: weights[name][:-1]}, path)


def add(path: Path) -> None:
    torch.save(torch.load(path) | {"other.weight": torch.ones(3)}, path)


def narrower(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_sam, "DIM", 32)
        torch.save(tiny_sam.build_tiny_sam().state_dict(), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "--checkpoint must be a readable file"),
        (lambda path: path.unlink(), "--checkpoint must be a readable file"),
        (lambda path: path.write_text("<html>"), "--checkpoint must be a readable file"),
        (half, "--checkpoint must be a readable file"),
        (lambda path: torch.save([1, 2], path), "--checkpoint must hold named tensors"),
        (drop, "1 weights missing, 0 unexpected, 0 of another shape"),
        (reshape, "0 weights missing, 0 unexpected, 1 of another shape"),
        (add, "0 weights missing, 1 unexpected, 0 of another shape (other.weight)"),
        (narrower, "0 weights missing, 0 unexpected"),
        (lambda path: torch.save({0: torch.ones(1)}, path), "--checkpoint must hold named"),
        (lambda path: torch.save(build("sam2").model.state_dict(), path), "another size"),
    ],
)
def test_wrong_checkpoints(spoil, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / "weights.pth", build("sam").model
    torch.save(model.state_dict(), path)
    spoil(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="--checkpoint") as error:
        load_weights(model, path, "tiny")
    assert message in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("package", "key"), [(sam, None), (sam2, "model")])
def test_right_checkpoints(package, key: str | None, tmp_path: Path) -> None:
    weights = build(package.__name__.removeprefix("parts.")).model.state_dict()
    torch.save(weights if key is None else {key: weights}, tmp_path / "weights.pt")
    found = package.build("tiny", tmp_path / "weights.pt").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_checkpoints_of_safetensors(tmp_path: Path) -> None:
    weights, path = build("sam").model.state_dict(), tmp_path / "weights.safetensors"
    save_file(weights, path)
    found = sam.build("tiny", path).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    half(path)
    with pytest.raises(ValueError, match="--checkpoint must be a readable file"):
        sam.build("tiny", path)


@pytest.mark.parametrize("name", ["tiny-sam", "tiny-sam2"])
def test_folders_of_transformers(name: str, tmp_path: Path, inputs) -> None:
    images, boxes, *_ = inputs
    source = huggingface.build(name).eval()
    source.model.save_pretrained(tmp_path)
    found = huggingface.build(str(tmp_path)).eval()
    assert (found.frame, found.dim) == (source.frame, source.dim)
    with torch.no_grad():
        assert torch.equal(found(images, Prompts(boxes)), source(images, Prompts(boxes)))

    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key, value in weights.items() if value.ndim == 2)
    reshaped = weights | {key: weights[key][:-1].clone()}
    lacking = {k: value for k, value in weights.items() if k != key}
    for spoiled, message in ((reshaped, "readable weights"), (lacking, "all weights")):
        save_file(spoiled, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"--model must hold {message}"):
            huggingface.build(str(tmp_path))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    half(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--model must hold readable weights"):
        huggingface.build(str(tmp_path))
    other = huggingface.tiny_sam2() if name == "tiny-sam" else huggingface.tiny_sam()
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="are missing or of another shape"):
        huggingface.build(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="must be a SAM or SAM2"):
        huggingface.build(str(tmp_path))
    with pytest.raises(ValueError, match="a model's folder, got nowhere"):
        huggingface.build("nowhere")


@pytest.mark.parametrize("config", ["<html>", "{}", '{"model_type": "sam99"}'])
def test_folders_with_a_bad_config(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="--model must"):
        huggingface.build(str(tmp_path))


def test_a_teacher_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="--teacher must take pictures"):
        check_teacher(build("sam2"), build("sam"))


# --- evaluation ----------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    class Fixed(nn.Module):
        frame = frame(False)

        def forward(self, images: Tensor, prompts: object) -> Tensor:
            logits = -torch.ones(len(images), 8, 8)
            logits[:, :4] = 1
            return logits

    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[2:6] = True  # overlaps by a third
    missed = torch.zeros(8, 8, dtype=torch.bool)
    missed[7] = True
    one = batch(torch.ones(2, 8, 8, dtype=torch.bool))._replace(truths=[truth, missed])
    two = batch(torch.ones(1, 8, 8, dtype=torch.bool))._replace(truths=[~truth])
    model = Fixed()
    state = torch.get_rng_state()
    scores = evaluate(model, [one, two], "points", 1)
    assert scores["iou"] == pytest.approx((1 / 3 + 0 + 1 / 3) / 3)
    assert scores["dice"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
