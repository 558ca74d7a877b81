"""Official checkpoints and folders of the packages: all of their weights, or nothing."""

import copy
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from finetuning_runs import build
from safetensors.torch import load_file, save_file
from torch import Tensor

from parts.data.prompts import Prompts
from parts.models import huggingface, sam, segmenter, small_sam, tiny_sam
from parts.models.adaptation import adapt
from parts.models.segmenter import check_teacher, load_weights


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


def overflow(path: Path) -> None:
    weights = torch.load(path)
    weights["mask_decoder.iou_token.weight"][0, 0] = math.inf
    torch.save(weights, path)


def convert(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    weights, name = torch.load(path), "mask_decoder.iou_token.weight"
    torch.save(weights | {name: change(weights[name])}, path)


as_sparse = partial(convert, change=Tensor.to_sparse)
as_integers = partial(convert, change=Tensor.char)
as_complex = partial(convert, change=Tensor.cfloat)


def narrower(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_sam, "DIM", 32)
        torch.save(tiny_sam.build_tiny_sam().state_dict(), path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
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
        (overflow, "finite weights, got"),
        (as_sparse, "dense tensors of floating point, got"),
        (as_integers, "1 others (mask_decoder.iou_token.weight: torch.int8, torch.strided)"),
        (as_complex, "1 others (mask_decoder.iou_token.weight: torch.complex64"),
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


@pytest.mark.parametrize(("package", "key"), [("sam", None), ("sam2", "model")])
def test_right_checkpoints(package: str, key: str | None, tmp_path: Path) -> None:
    weights = build(package).model.state_dict()
    torch.save(weights if key is None else {key: weights}, tmp_path / "weights.pt")
    found = segmenter.build(package, "tiny", tmp_path / "weights.pt").model.state_dict()
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
def test_folders_of_transformers(name: str, tmp_path: Path, inputs, capfd) -> None:
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
    for spoiled in (reshaped, lacking):
        save_file(spoiled, tmp_path / "model.safetensors", metadata={"format": "pt"})
        message = f"--model must hold all weights of .*: 1 are missing or of another .*{key}"
        with pytest.raises(ValueError, match=message):
            huggingface.build(str(tmp_path))
    assert "REPORT" not in capfd.readouterr().err
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken = weights | {key: weights[key] * math.nan}
    save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--model must hold finite weights"):
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
    with pytest.raises(ValueError, match=r"must be one of sam, sam_hq, .* with a bert"):
        huggingface.build(str(tmp_path))
    with pytest.raises(ValueError, match="a model's folder, got nowhere"):
        huggingface.build("nowhere")


BAD_VISION = '{"model_type": "sam", "vision_config": "abc"}'


@pytest.mark.parametrize("config", ["<html>", "{}", '{"model_type": "sam99"}', BAD_VISION])
def test_folders_with_a_bad_config(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="--model must"):
        huggingface.build(str(tmp_path))


def test_a_teacher_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="--teacher must take pictures"):
        check_teacher(build("sam2"), build("sam"))


@pytest.fixture(scope="module")
def small() -> segmenter.Segmenter:
    torch.manual_seed(0)
    return sam.build("small", None).eval()


def test_the_small_sam_has_a_finer_grid(small) -> None:
    """A place of the embedding for 8 by 8 pixels, and the official classes around the backbone."""
    assert small.stride == 8
    images = torch.randn(2, 3, 256, 256)
    (embedding,) = small.encode(images)
    assert embedding.shape == (2, small.dim, 32, 32)
    boxes = Prompts(torch.tensor([[10.0, 20.0, 90.0, 120.0]] * 2))
    assert small(images, boxes).shape == (2, 128, 128)
    assert type(small.model).__module__.startswith("segment_anything")
    assert small.stages == [1, 3]


def test_the_backbone_of_the_small_sam_stays_as_it_is(small) -> None:
    """Neither training nor the statistics of a batch change what the backbone gives."""
    student = copy.deepcopy(small)
    adapt(student, "lora", targets=["qkv"])
    student.train()
    backbone = student.encoder.patch_embed.backbone
    assert not any(p.requires_grad for p in backbone.parameters())
    before = copy.deepcopy(backbone.state_dict())
    images = torch.randn(2, 3, 256, 256)
    boxes = Prompts(torch.tensor([[10.0, 20.0, 90.0, 120.0]] * 2))
    student(images, boxes).square().mean().backward()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    torch.testing.assert_close(
        student.encoder.patch_embed(images), small.encoder.patch_embed(images), rtol=0, atol=0
    )


def test_the_small_sam_normalises_for_its_backbone(small, monkeypatch) -> None:
    """Pixels of 0 to 255 come to (x - 127) / 128, through the normalisation of SAM."""
    pixels = torch.rand(1, 3, 256, 256) * 255
    embedding = small.encoder.patch_embed
    seen = []
    handle = embedding.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding((pixels - small.model.pixel_mean) / small.model.pixel_std)
    handle.remove()
    torch.testing.assert_close(seen[0], (pixels - 127) / 128, rtol=0, atol=1e-5)


def test_the_backbone_sees_a_picture_once(small, monkeypatch) -> None:
    """What is remembered is what the backbone gives, in each precision and past the limit."""
    embedding = copy.deepcopy(small.encoder.patch_embed)
    embedding.seen = {}  # an earlier test may have left something
    fresh = copy.deepcopy(embedding)
    fresh.seen = None
    asked = []
    embedding.backbone.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    monkeypatch.setattr(small_sam, "MOST_SEEN", 3)
    a, b, c, d = torch.randn(4, 1, 3, 256, 256)
    for images, new in (((a, b), 2), ((b, a), 0), ((b, c), 1), ((c, d), 2), ((a,), 1)):
        asked.clear()
        batch = torch.cat(images)
        torch.testing.assert_close(embedding(batch), fresh(batch))
        assert sum(asked) == new
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedding(a), fresh(a))
    assert sum(asked) == 2
