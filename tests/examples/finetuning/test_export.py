"""Trained students in the official packages: what is exported is whole, and gives their masks."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import BUILDS, FINETUNING, build, combinations, run
from PIL import Image
from safetensors.torch import load_file
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor
from transformers import (
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

import export
from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.errors import InputError
from parts.models import huggingface, sam2
from parts.models.adaptation import NOT_MERGED, adapt
from parts.models.tiny_sam import build_tiny_sam
from parts.options import METHODS
from parts.runs.trained import export as export_student
from parts.runs.trained import load_adapters, load_run

BOX = np.array([60.0, 50.0, 180.0, 190.0])


@pytest.fixture(scope="module")
def image(data: Path) -> np.ndarray:
    # A copy, as PyTorch warns of arrays that it must not write to.
    return np.array(Image.open(data / "test" / "0000.jpg"))


def official(family: str, path: Path, method: str) -> torch.nn.Module:
    """The model as its package loads it, from what was exported."""
    merged = method not in NOT_MERGED
    if family == "sam":
        # As sam_model_registry does, which has no entry of this size.
        model = build_tiny_sam()
        return load_state(model, path) if merged else load_adapters(model, path, method=method)
    if family == "sam2":
        return build_or_adapt(path, method, sam2.TINY)
    kind = SamModel if family == "transformers-sam" else Sam2Model
    if merged:
        return kind.from_pretrained(path).eval()
    build = huggingface.tiny_sam if kind is SamModel else huggingface.tiny_sam2
    model = load_adapters(build(), path, method=method)
    if kind is Sam2Model:
        model.mask_decoder.dynamic_multimask_via_stability = False
    return model


def load_state(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def build_or_adapt(path: Path, method: str, overrides: list[str]) -> torch.nn.Module:
    arguments = {"device": "cpu", "apply_postprocessing": False, "hydra_overrides_extra": overrides}
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    if method in NOT_MERGED:
        return load_adapters(build_sam2(config, **arguments), path, method=method)
    return build_sam2(config, str(path), **arguments)


def predicted(family: str, model: torch.nn.Module, image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Masks and logits (H, W) by the package's own predictor."""
    if family.startswith("transformers"):
        frame = Frame(256, keep_aspect=family == "transformers-sam")
        with torch.no_grad():
            output = model(
                pixel_values=frame.image(image)[None],
                input_boxes=torch.from_numpy(BOX).float()[None, None],
                multimask_output=False,
            )
        logits = frame.restore(output.pred_masks[0, 0, 0], *image.shape[:2]).numpy()
        return logits > 0, logits
    predictor = SamPredictor(model) if family == "sam" else SAM2ImagePredictor(model)
    if family == "sam2":
        predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # it has those of 1024 pixels
    predictor.set_image(image)
    asked = {"box": BOX, "multimask_output": False}
    masks, *_ = predictor.predict(**asked)
    logits, *_ = predictor.predict(**asked, return_logits=True)
    return masks[0] > 0, logits[0]


@pytest.mark.parametrize(("family", "method"), combinations(METHODS))
def test_the_official_predictor_gives_the_student(
    family: str, method: str, trained, image: np.ndarray, tmp_path: Path
) -> None:
    run = trained(family, method)
    path = tmp_path / "exported"
    export.main([str(run), str(path)])
    masks, logits = predicted(family, official(family, path, method), image)

    own = logits_of(run, image)
    assert np.abs(logits - own).max() <= 1e-4 * np.abs(own).max()
    undecided = np.abs(own) < 1e-4 * np.abs(own).max()
    assert (masks == (own > 0))[~undecided].all()
    # Training changes the logits by more than that.
    before = logits_of(run, image, epoch=0)
    assert np.abs(own - before).max() > 1e-3 * np.abs(own).max()


def logits_of(run: Path, image: np.ndarray, epoch: int | None = None) -> np.ndarray:
    student, _ = load_run(run, epoch)
    with torch.no_grad():
        box = student.frame.boxes(torch.from_numpy(BOX).float()[None], *image.shape[:2])
        logits = student(student.frame.image(image)[None], Prompts(box))[0]
    return student.frame.restore(logits, *image.shape[:2]).numpy()


def test_averaged_weights_are_exported(trained, tmp_path: Path) -> None:
    """Each is between that of the student and that before training."""
    run, path = trained("sam", "lora"), tmp_path / "leaf.pth"
    export.main([str(run), str(path), "--average", "0.75"])
    before = load_run(run, 0)[0].model.state_dict()
    export_student(*load_run(run), tmp_path / "whole.pth")
    after = torch.load(tmp_path / "whole.pth", weights_only=True)
    found = torch.load(path, weights_only=True)
    assert found.keys() == after.keys()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, value in found.items():
        torch.testing.assert_close(value, 0.75 * after[name] + 0.25 * before[name])


def test_exports_replace_nothing_and_make_folders(trained, tmp_path: Path, capsys) -> None:
    run = str(trained("sam", "lora"))
    export.main([run, str(tmp_path / "new" / "leaf.pth")])
    assert "multimask_output=False" in capsys.readouterr().out
    load_state(build_tiny_sam(), tmp_path / "new" / "leaf.pth")
    before = (tmp_path / "new" / "leaf.pth").read_bytes()
    for target in (tmp_path / "new" / "leaf.pth", tmp_path / "new"):
        with pytest.raises(SystemExit, match="exists; nothing is written over it"):
            export.main([run, str(target)])
    assert (tmp_path / "new" / "leaf.pth").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["leaf.pth"]


def test_adapters_are_loaded_by_what_is_named(trained, tmp_path: Path, capsys) -> None:
    export.main([str(trained("sam2", "adapter")), str(tmp_path / "adapters.pt")])
    said = capsys.readouterr().out
    (file,) = re.findall(r"parts/\S+\.py", said)
    assert "def load_adapters(" in (FINETUNING / file).read_text()
    assert f'load_adapters(model, Path("{tmp_path}/adapters.pt"), method="adapter")' in said


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("conv-lora", "must hold a model of this size with conv-lora, got .*adapter"),
        ("adaptformer", "must hold a model of this size with adaptformer, got .*adapter"),
        ("lora", "method must be one of adapter, .* got lora. The others are merged"),
    ],
)
def test_adapters_of_another_method(method: str, message: str, tmp_path: Path) -> None:
    student = build("sam")
    adapt(student, "adapter", targets=["qkv"])
    torch.save(student.model.state_dict(), tmp_path / "adapters.pth")
    with pytest.raises(InputError, match=message):
        load_adapters(build_tiny_sam(), tmp_path / "adapters.pth", method=method)


@pytest.mark.parametrize("family", ["sam", "transformers-sam"])
@pytest.mark.parametrize("method", NOT_MERGED)
@torch.no_grad()
def test_what_is_not_merged_is_loaded(family: str, method: str, inputs, tmp_path: Path) -> None:
    student = build(family)
    adapt(student, method, rank=2, targets=["qkv"])
    for parameter in student.encoder.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    package, name, *_ = BUILDS[family]
    export_student(student, Namespace(package=package, model=name), tmp_path / "exported")
    loaded = build(family)
    load_adapters(loaded.model, tmp_path / "exported", method=method)
    images, boxes, *_ = inputs
    before = build(family)(images, Prompts(boxes))
    expected = student.eval()(images, Prompts(boxes))
    assert torch.equal(loaded(images, Prompts(boxes)), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}", "x.pth"], "must hold a run, and has no options.json"),
        (["{run}", "x.pth", "--epoch", "9"], "must hold the checkpoint of epoch 9"),
        (["{run}", "x.pth", "--checkpoint", "other"], "is not there any more; say by --checkpoint"),
        (["{run}", "x.pth", "--teacher-checkpoint", "other"], "--teacher-checkpoint was not given"),
        (["{adapted}", "x.pth", "--average", "0.5"], "--average needs a method that is merged"),
    ],
)
def test_wrong_exports(
    arguments: list[str], message: str, trained, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"run": trained("sam", "lora"), "adapted": trained("sam", "adapter")}
    places["empty"] = tmp_path
    with pytest.raises(SystemExit, match=message):
        export.main([argument.format(**places) for argument in arguments])
    assert not (tmp_path / "x.pth").exists()


def test_weights_that_are_not_finite_are_not_exported(trained, tmp_path: Path) -> None:
    student, options = load_run(trained("sam", "lora"))
    next(student.decoder.parameters()).data[0] = np.nan
    with pytest.raises(ValueError, match="the student must have finite weights: 1 of "):
        export_student(student, options, tmp_path / "leaf.pth")
    assert not any(tmp_path.iterdir())


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_export_to_a_full_disk_leaves_nothing(trained, tmp_path: Path) -> None:
    program = [str(FINETUNING / "export.py"), str(trained("sam", "lora")), "leaf.pth"]
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, *program],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    message = f"error: {tmp_path}/leaf.pth: File too large (files on that disk may not be so large)"
    assert process.stderr.splitlines() == [message]
    assert not any(tmp_path.iterdir())


# --- folders of transformers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A SAM with its processor, and a SAM2 for videos."""
    base = tmp_path_factory.mktemp("models")
    huggingface.tiny_sam().save_pretrained(base / "sam")
    SamProcessor(SamImageProcessor()).save_pretrained(base / "sam")
    image = huggingface.tiny_sam2().config
    config = Sam2VideoConfig(
        vision_config=image.vision_config.to_dict(),
        prompt_encoder_config=image.prompt_encoder_config.to_dict(),
        mask_decoder_config=image.mask_decoder_config.to_dict(),
        image_size=256,
        memory_attention_hidden_size=64,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_num_layers=1,
        memory_attention_rope_feat_sizes=[16, 16],
        memory_encoder_hidden_size=64,
        memory_encoder_output_channels=16,
        mask_downsampler_embed_dim=64,
        memory_fuser_embed_dim=64,
        memory_fuser_intermediate_dim=64,
    )
    Sam2VideoModel(config).save_pretrained(base / "video")
    return base


def trained_on(folder: Path, data: Path, output: Path, method: str) -> Path:
    options = ["--model", folder, "--method", method, "--epochs", 1, "--lr", 1e-2]
    run("transformers-sam", data, output, *options)
    return output


def test_an_export_has_the_processor_of_its_model(folders, data: Path, tmp_path: Path) -> None:
    trained_on(folders / "sam", data, tmp_path / "run", "lora")
    export.main([str(tmp_path / "run"), str(tmp_path / "exported")])
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {path.name for path in (folders / "sam").iterdir()}
    SamProcessor.from_pretrained(tmp_path / "exported")
    SamModel.from_pretrained(tmp_path / "exported")


@pytest.mark.parametrize("method", ["lora", "adapter", "conv-lora"])
def test_an_export_has_the_parts_for_videos(
    method: str, folders, data: Path, image: np.ndarray, tmp_path: Path
) -> None:
    run = trained_on(folders / "video", data, tmp_path / "run", method)
    export.main([str(run), str(tmp_path / "exported")])
    before = load_file(folders / "video" / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert before.keys() == {key for key in after if not re.search(r"adapter|conv_lora", key)}
    memory = [key for key in before if key.startswith("memory_")]
    assert memory
    assert all(torch.equal(before[key], after[key]) for key in memory)
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("mask_decoder"))
    if method == "lora":
        Sam2VideoModel.from_pretrained(tmp_path / "exported")
        model = Sam2Model.from_pretrained(tmp_path / "exported").eval()
        _, logits = predicted("transformers-sam2", model, image)
        own = logits_of(run, image)
        assert np.abs(logits - own).max() <= 1e-4 * np.abs(own).max()
