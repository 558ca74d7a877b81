"""The fine-tuning scripts as the tests use them: on small models, small data, and for few steps."""

import copy
import csv
import importlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
FINETUNING = Path(__file__).parents[2] / "examples" / "finetuning"
WEIGHTS = str(QUICKSTART / "tiny_sam.safetensors")

# The script and the model of each family.
FAMILIES = {
    "sam": ["finetune_sam", "--model", "tiny", "--checkpoint", WEIGHTS],
    "sam2": ["finetune_sam2", "--model", "tiny"],
    "transformers-sam": ["finetune_transformers", "--model", "tiny-sam"],
    "transformers-sam2": ["finetune_transformers", "--model", "tiny-sam2"],
}
# The file of the parts that builds the same model with random weights, and what its `build` takes.
BUILDS = {
    "sam": ("sam", "tiny", None),
    "sam2": ("sam2", "tiny", None),
    "transformers-sam": ("huggingface", "tiny-sam"),
    "transformers-sam2": ("huggingface", "tiny-sam2"),
}
# The one method of each family that is not slow; the four stand for all of them.
FAST_METHODS = {
    "sam": "lora",
    "sam2": "adapter",
    "transformers-sam": "lora-heads",
    "transformers-sam2": "bitfit",
}
# The attention of SAM2 changes the shape of its input in some blocks, and HQ-SAM is made for SAM.
IMPOSSIBLE = {
    (family, method)
    for family in ("sam2", "transformers-sam2")
    for method in ("su-sam-parallel", "hq-sam")
}
EPOCHS = 2
# With these the loss falls within two epochs; some models with random weights need large steps.
LEARNING_RATES = {
    "sam": 1e-3,
    "sam2": 1e-3,
    "transformers-sam": 3e-3,
    "transformers-sam2": 1e-2,
}


def combinations(
    methods: Iterable[str], also_fast: Callable[[str, str], bool] = lambda family, method: False
) -> list[object]:
    """Return each family with each method, as slow tests but for those of `FAST_METHODS`.

    The pairs of `IMPOSSIBLE` are left out.
    """
    return [
        pytest.param(
            family,
            method,
            marks=() if method == usual or also_fast(family, method) else pytest.mark.slow,
        )
        for family, usual in FAST_METHODS.items()
        for method in methods
        if (family, method) not in IMPOSSIBLE
    ]


@cache
def build_once(family: str) -> nn.Module:
    """Return the model of a family, which must not be changed."""
    package, *arguments = BUILDS[family]
    torch.manual_seed(0)
    return importlib.import_module(f"parts.models.{package}").build(*arguments).eval()


def build(family: str) -> nn.Module:
    """Return a new model of a family; a copy is faster than building it again."""
    model = copy.deepcopy(build_once(family))
    torch.manual_seed(0)
    return model


def make_data(folder: Path, train: int, val: int, test: int) -> Path:
    """Write a generated data set with so many images, and return its folder."""
    sizes = ["--train", train, "--val", val, "--test", test]
    importlib.import_module("make_dataset").main([str(folder), *map(str, sizes)])
    return folder


def run(family: str, data: Path | None, output: Path, *options: object) -> None:
    """Fine-tune in this process, by default with batches of two and a row of the log for each."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script, *model = FAMILIES[family]
    common = ["--output", output, "--workers", 0, *([] if data is None else ["--data", data])]
    common += ["--log-every", 1, "--batch-size", 2, *options]
    importlib.import_module(script).main([*model, *map(str, common)])


def training_options(family: str, method: str) -> list[object]:
    """Return options with which the loss of a family falls within a few steps."""
    # With boxes alone, epochs differ in nothing but the order of the images and the noise.
    options = ["--method", method, "--lr", LEARNING_RATES[family], "--prompts", "boxes"]
    return [*options, "--epochs", EPOCHS]


def rows(output: Path, name: str = "training") -> list[dict[str, float]]:
    """Return the rows of a table of a run."""
    with (output / f"{name}.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return everything of a checkpoint that trains."""
    return {
        f"{path.stem}.{key}": value
        for path in sorted(checkpoint.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def stop_and_resume(family: str, data: Path, output: Path, options: list[object]) -> None:
    """Train, but stop after the first epoch and go on from its checkpoint."""
    checkpoint = importlib.import_module("parts.runs.checkpoint")
    save = checkpoint.save

    def save_and_stop(*args) -> None:
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(family, data, output, *options)
    torch.manual_seed(99)  # nothing of this process is to be needed
    run(family, data, output, *options, "--resume")


def assert_same_run(one: Path, other: Path, epoch: str) -> None:
    """Assert the same weights bit for bit, the same figures and the same result."""
    expected, found = weights(one / epoch), weights(other / epoch)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert rows(one) == rows(other)
    assert (one / "result.json").read_text() == (other / "result.json").read_text()


def assert_tensorboard_has_the_tables(output: Path) -> None:
    """Assert that TensorBoard has the figures of training.csv and validation.csv."""
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    for name in ("training", "validation"):
        table = rows(output, name)
        for key in table[0].keys() - {"step"}:
            found = [(event.step, event.value) for event in events.Scalars(f"{name}/{key}")]
            assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in table]


def outcome(data: Path, output: Path, capsys, *options: object) -> str:
    """Return what a call says that is refused."""
    with pytest.raises(SystemExit) as exit_info:
        run("sam", data, output, *options)
    return f"{exit_info.value}{capsys.readouterr().err}"
