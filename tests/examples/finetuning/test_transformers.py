"""The newer models of transformers, from folders and from the Hub, in every program."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from finetuning_runs import run
from huggingface_hub import constants
from models import SIZE, tiny_hf_edgetam, tiny_hf_sam3_tracker, tiny_hf_sam_hq
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import evaluate
import export
import predict
from parts.data.prompts import Prompts
from parts.errors import InputError
from parts.models import huggingface
from parts.models.adaptation import adapt
from parts.options import METHODS
from parts.runs.trained import load_run
from renyi_kd import FeatureCollector, Features


def edgetam_video() -> nn.Module:
    image = tiny_hf_edgetam().config
    widths = {
        "memory_attention_hidden_size": 32,
        "memory_attention_mlp_hidden_size": 32,
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "perceiver_resampler_hidden_size": 16,
    }
    config = transformers.EdgeTamVideoConfig(
        vision_config=image.vision_config,
        prompt_encoder_config=image.prompt_encoder_config.to_dict(),
        mask_decoder_config=image.mask_decoder_config.to_dict(),
        image_size=SIZE,
        memory_attention_rope_feat_sizes=[4, 4],
        **widths,
    )
    return transformers.EdgeTamVideoModel(config)


# What each is built by, its class, and a method that it can be trained by.
KINDS = {
    "sam_hq": (tiny_hf_sam_hq, "SamHQModel", ["--method", "lora"]),
    "edgetam": (tiny_hf_edgetam, "EdgeTamModel", ["--method", "decoder"]),
    "edgetam_video": (edgetam_video, "EdgeTamModel", ["--method", "decoder"]),
    "sam3_tracker": (
        tiny_hf_sam3_tracker,
        "Sam3TrackerModel",
        ["--method", "lora", "--targets", "q_proj", "v_proj"],
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory) -> Path:
    model = KINDS[kind][0]()
    if hasattr(model, "no_memory_embedding"):
        nn.init.normal_(model.no_memory_embedding)  # zero in a new model
    path = tmp_path_factory.mktemp("models") / kind
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def trained(kind: str, folder: Path, data: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / kind
    cache = ["--teacher-cache", output.parent / "cache"]
    options = [*KINDS[kind][2], *cache, "--epochs", 2, "--lr", 1e-2, "--prompts", "boxes"]
    run("transformers-sam", data, output, "--model", folder, *options)
    return output


@torch.no_grad()
def test_logits_and_tokens_are_those_of_transformers(kind: str, folder: Path) -> None:
    model = huggingface.build(str(folder)).eval()
    official = getattr(transformers, KINDS[kind][1]).from_pretrained(folder).eval()
    if hasattr(official.mask_decoder, "dynamic_multimask_via_stability"):
        official.mask_decoder.dynamic_multimask_via_stability = False
    images, boxes = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[5.0, 8, 40, 50], [9, 3, 60, 33]])
    points, labels = torch.tensor([[[20.0, 20]], [[40, 30]]]), torch.ones(2, 1).int()
    asked = [
        (Prompts(boxes), {"input_boxes": boxes[:, None]}),
        (
            Prompts(points=points, labels=labels),
            {"input_points": points[:, None], "input_labels": labels[:, None]},
        ),
    ]
    for prompts, keywords in asked:
        with FeatureCollector(official) as of_official, FeatureCollector(model) as of_model:
            masks = official(pixel_values=images, multimask_output=False, **keywords).pred_masks
            torch.testing.assert_close(model(images, prompts), masks[:, 0, 0])
            embedding, tokens = of_official.pop()
            found = of_model.pop()
            torch.testing.assert_close(found, Features(embedding, tokens))
            model.decode([embedding], prompts)  # as with a cached embedding
            torch.testing.assert_close(of_model.pop(embedding).mask_tokens, tokens)
    side = model.frame.size // model.stride
    assert embedding.shape == (2, model.dim, side, side)


def test_pictures_are_normalised_as_by_the_processor(kind: str, folder: Path) -> None:
    """SAM3's are not those of ImageNet."""
    processors = {
        "sam_hq": "SamImageProcessor",
        "edgetam": "Sam2ImageProcessor",
        "edgetam_video": "Sam2ImageProcessor",
        "sam3_tracker": "Sam3ImageProcessor",
    }
    frame = huggingface.build(str(folder)).frame
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    size = {"longest_edge": SIZE} if kind == "sam_hq" else {"height": SIZE, "width": SIZE}
    padded = {"pad_size": {"height": SIZE, "width": SIZE}} if kind == "sam_hq" else {}
    processor = getattr(transformers, processors[kind])(size=size, **padded)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(frame.image(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["edgetam", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "edgetam")],
    indirect=True,
)
def test_every_program_takes_the_run(
    kind: str, folder: Path, trained: Path, data: Path, tmp_path: Path, capsys
) -> None:
    evaluate.main([str(trained), "--pretrained"])
    printed = capsys.readouterr().out
    assert f"{trained} before" in printed
    masks = tmp_path / "masks"
    box = ["--box", "60", "50", "180", "190"]
    predict.main([str(trained), str(data / "test"), *box, "--output", str(masks)])
    assert len([*masks.iterdir()]) == len([*(data / "test").iterdir()])

    export.main([str(trained), str(tmp_path / "exported")])
    assert "from_pretrained(" in capsys.readouterr().out
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(tmp_path / "exported").eval()
    assert (tmp_path / "exported" / "preprocessor_config.json").exists()
    before = load_file(folder / "model.safetensors")
    assert before.keys() == load_file(tmp_path / "exported" / "model.safetensors").keys()
    student, _ = load_run(trained)
    image = np.array(Image.open(data / "test" / "0000.jpg"))
    pixels, box = student.frame.image(image)[None], torch.tensor([[15.0, 12, 45, 48]])
    with torch.no_grad():
        own = student(pixels, Prompts(box))
        before = load_run(trained, 0)[0](pixels, Prompts(box))
        found = model(pixel_values=pixels, input_boxes=box[None], multimask_output=False).pred_masks
    torch.testing.assert_close(found[0, 0], own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    assert (own - before).abs().max() > 1e-2 * own.abs().max()


@pytest.mark.parametrize("build", [tiny_hf_edgetam, tiny_hf_sam3_tracker])
def test_methods_fit_or_say_so(build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    fits = {"bitfit", "decoder"}
    model = huggingface.build(str(tmp_path))
    for method in METHODS:
        student = copy.deepcopy(model)
        if method in fits:
            assert "image encoder" in adapt(student, method, targets=["qkv"])
            continue
        with pytest.raises(InputError, match=r"must match something in|must have the image enc"):
            adapt(student, method, targets=["qkv"])


def test_what_a_model_has_not_is_said(data: Path, tmp_path: Path) -> None:
    tiny_hf_edgetam().save_pretrained(tmp_path / "edgetam")
    tiny_hf_sam_hq().save_pretrained(tmp_path / "sam_hq")
    for name, options, message in (
        ("edgetam", ["--method", "bitfit", "--distiller", "vid"], "has no transformer blocks"),
        ("sam_hq", ["--method", "hq-sam"], "makes a HQ-SAM of a SAM, and --model is one"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("transformers-sam", data, tmp_path / "run", "--model", tmp_path / name, *options)
        assert not (tmp_path / "run").exists()


# Names of the Hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """The Hub's cache with the model owner/tiny, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--tiny"
    huggingface.tiny_sam().save_pretrained(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    return repository


def test_a_model_of_the_hub(cache: Path, data: Path, tmp_path: Path, capsys) -> None:
    options = ["--teacher", "owner/tiny", "--epochs", 1]
    run("transformers-sam", data, tmp_path / "run", "--model", "owner/tiny", *options)
    student, recorded = load_run(tmp_path / "run", 0)
    assert recorded.model == recorded.teacher == cache / "snapshots" / "0123"
    expected = transformers.SamModel.from_pretrained(recorded.model).state_dict()
    assert all(torch.equal(x, expected[k]) for k, x in student.model.state_dict().items())
    export.main([str(tmp_path / "run"), str(tmp_path / "exported")])
    options.append("--resume")
    with pytest.raises(SystemExit, match="finished run"):
        run("transformers-sam", data, tmp_path / "run", "--model", "owner/tiny", *options)


@pytest.mark.parametrize("option", ["--model", "--teacher"])
def test_a_model_that_cannot_be_had(option: str, cache, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run("transformers-sam", data, tmp_path / "run", option, "owner/missing")
    message = str(error.value)
    assert message.startswith(f"error: {option} must be tiny-sam, tiny-sam2, a model's folder, or")
    assert "got owner/missing: " in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_folder_goes_before_a_name_of_the_hub(cache, tmp_path: Path, monkeypatch) -> None:
    from parts.options import model_folder

    monkeypatch.chdir(tmp_path)
    assert model_folder("owner/tiny") == "owner/tiny"
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert model_folder("owner/tiny") == str(tmp_path / "owner" / "tiny")
    assert model_folder("a/b/c") == str(tmp_path / "a" / "b" / "c")
