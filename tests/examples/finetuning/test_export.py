"""Trained students in the official packages, and masks of a folder of images."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import FAST_METHODS, FINETUNING, QUICKSTART, WEIGHTS, combinations
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor
from transformers import Sam2Model, SamModel

import export
import predict
from parts import huggingface, sam2
from parts.adaptation import METHODS
from parts.frame import Frame
from parts.prompts import Prompts
from parts.tiny_sam import build_tiny_sam
from parts.trained import load_adapters, load_run

BOX = np.array([60.0, 50.0, 180.0, 190.0])


@pytest.fixture(scope="module")
def image(data: Path) -> np.ndarray:
    # A copy, as PyTorch warns of arrays that it must not write to.
    return np.array(Image.open(data / "test" / "0000.jpg"))


def official(family: str, path: Path, method: str) -> torch.nn.Module:
    """The model as its package loads it, from what was exported."""
    adapters = method == "adapter"
    if family == "sam":
        # As sam_model_registry does, which has no entry of this size.
        model = build_tiny_sam()
        return load_adapters(model, path) if adapters else load_state(model, path)
    if family == "sam2":
        return build_or_adapt(path, adapters, sam2.TINY)
    kind = SamModel if family == "transformers-sam" else Sam2Model
    if adapters:
        build = huggingface.tiny_sam if kind is SamModel else huggingface.tiny_sam2
        model = load_adapters(build(), path)
    else:
        model = kind.from_pretrained(path).eval()
    if kind is Sam2Model and adapters:
        model.mask_decoder.dynamic_multimask_via_stability = False
    return model


def load_state(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def build_or_adapt(path: Path, adapters: bool, overrides: list[str]) -> torch.nn.Module:
    arguments = {"device": "cpu", "apply_postprocessing": False, "hydra_overrides_extra": overrides}
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    if adapters:
        return load_adapters(build_sam2(config, **arguments), path)
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


def write_table(path: Path, header: str, rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


@pytest.mark.parametrize("family", ["sam", "transformers-sam2"])
def test_predict(family: str, trained, image: np.ndarray, tmp_path: Path) -> None:
    run = trained(family, FAST_METHODS[family])
    # A few steps from random weights end with masks that are empty; there are none to begin with.
    epoch = None if family == "sam" else 0
    wide = np.concatenate([image, image[:, ::-1]], axis=1)
    (tmp_path / "sub").mkdir()
    Image.fromarray(wide).save(tmp_path / "sub" / "wide.png")
    boxes = [[60, 50, 180, 190], [300, 20, 480, 200]]
    write_table(
        tmp_path / "boxes.csv", "image,x0,y0,x1,y1", [["sub/wide.png", *box] for box in boxes]
    )
    asked = [] if epoch is None else ["--epoch", str(epoch)]
    table = [str(run), str(tmp_path / "boxes.csv")]
    predict.main([*table, "--output", str(tmp_path / "masks"), *asked])

    student, _ = load_run(run, epoch)
    for name, box in zip(("wide.png", "wide-2.png"), boxes, strict=True):
        mask = np.asarray(Image.open(tmp_path / "masks" / "sub" / name))
        assert mask.shape == wide.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        scaled = student.frame.boxes(torch.tensor([box]).float(), *mask.shape)
        with torch.no_grad():
            logits = student(student.frame.image(wide)[None], Prompts(scaled))[0]
        expected = student.frame.restore(logits, *mask.shape).numpy() > 0
        assert 0.01 < expected.mean() < 0.99
        assert (mask > 0).mean() == pytest.approx(expected.mean(), abs=1e-3)
        assert ((mask > 0) == expected).mean() > 0.999

    points = [["sub/wide.png", 120, 120, 1], ["sub/wide.png", 20, 20, 0]]
    write_table(tmp_path / "points.csv", "image,x,y,label", points)
    predict.main([str(run), str(tmp_path / "points.csv"), "--output", str(tmp_path / "by points")])
    assert [path.name for path in (tmp_path / "by points").rglob("*.png")] == ["wide.png"]


def test_masks_replace_nothing(trained, image: np.ndarray, tmp_path: Path) -> None:
    run = trained("sam", "lora")
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "b.jpg"):
        Image.fromarray(image).save(tmp_path / "images" / name)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    absolute = str(tmp_path / "images" / "a.png")

    def ask(names: list[str], folder: str, output: str) -> None:
        write_table(tmp_path / "t.csv", "image,x,y,label", [[name, 99, 99, 1] for name in names])
        options = ["--images", str(tmp_path / folder), "--output", str(tmp_path / output)]
        predict.main([str(run), str(tmp_path / "t.csv"), *options])

    ask([absolute], "images", "absolute")
    (tmp_path / "elsewhere").mkdir()
    ask(["../images/a.png"], "elsewhere", "above")
    for output in ("absolute", "above"):
        assert [path.name for path in (tmp_path / output).rglob("*.*")] == ["a.png"]
    with pytest.raises(SystemExit, match="a mask would replace"):
        ask(["a.png"], "images", "images")
    with pytest.raises(SystemExit, match=r"b.jpg and b.png would both have the mask"):
        ask(["b.png", "b.jpg"], "images", "twice")
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before


def test_wrong_runs_and_tables(trained, tmp_path: Path) -> None:
    run = trained("sam", "lora")
    target = str(tmp_path / "exported.pth")
    write_table(tmp_path / "wrong.csv", "file,x,y", [["a.png", 1, 2]])
    write_table(tmp_path / "absent.csv", "image,x,y,label", [["a.png", 1, 2, 1]])
    output = ["--output", str(tmp_path / "masks")]
    for script, arguments, message in (
        (export, [str(tmp_path), target], "must hold a run with a checkpoint"),
        (export, [str(run), target, "--epoch", "9"], "must hold the checkpoint of epoch 9"),
        (export, [str(run), str(run)], "exists"),
        (predict, [str(run), str(tmp_path / "wrong.csv"), *output], "must have columns image and"),
        (predict, [str(run), str(tmp_path / "absent.csv"), *output], "a.png cannot be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "method"),
    [
        ("finetune_sam.py", ["tiny", "--checkpoint", WEIGHTS], "lora"),
        ("finetune_sam2.py", ["tiny"], "adapter"),
    ],
)
def test_from_training_to_masks_by_the_documented_commands(
    script: str, model: list[str], method: str, tmp_path: Path
) -> None:
    def call(name: str, *arguments: object, folder: Path = FINETUNING) -> str:
        command = [sys.executable, str(folder / name), *map(str, arguments)]
        process = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return process.stdout

    sizes = ["--train", 8, "--val", 2, "--test", 5]
    call("make_dataset.py", "data", *sizes, folder=QUICKSTART)
    options = ["--data", "data", "--epochs", 2, "--method", method, "--teacher-cache", "cache"]
    call(script, "--model", *model, *options, "--output", "run")
    assert "run before" in call("evaluate.py", "run", "--pretrained", "--output", "scores")
    drawn = call("pictures.py", "run", "--output", "pictures")
    for name in ("predictions", "relations", "curves"):
        assert f"{name}.png" in drawn
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # something is drawn
    assert "exported.pt" in call("export.py", "run", "exported.pt")
    boxes = [["0000.jpg", 60, 50, 180, 190], ["0003.jpg", 60, 50, 180, 190]]
    write_table(tmp_path / "boxes.csv", "image,x0,y0,x1,y1", boxes)
    call("predict.py", "run", "boxes.csv", "--images", "data/test", "--output", "masks")
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"0000.png", "0003.png"}
