"""The command line of the scripts, and whether a run may start or go on."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import broadcast_object_list

from parts import checkpoint, data
from parts.adaptation import METHODS
from parts.cache import DTYPES

T = TypeVar("T")
FREE = ("resume", "threads", "workers", "cpu", "log_every")  # may change when a run resumes


def parse(
    description: str, argv: Sequence[str] | None, package: str, models: Sequence[str] = ()
) -> argparse.Namespace:
    """Read the command line; the defaults are the paper's.

    Args:
        description: What the script does.
        argv: The arguments, by default those of the process.
        package: Name of the file beside this one that builds the model.
        models: The names that `--model` takes. If there are none, it takes a folder of weights.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("model")
    if models:
        group.add_argument("--model", choices=models, required=True)
        group.add_argument("--checkpoint", type=Path, help="official weights of --model")
        group.add_argument("--teacher", choices=models, help="a teacher of another size")
        group.add_argument("--teacher-checkpoint", type=Path, help="official weights of --teacher")
    else:
        group.add_argument("--model", required=True, help="a folder, tiny-sam or tiny-sam2")
    group.add_argument(
        "--teacher-cache", type=Path, help="folder for the teacher's image embeddings"
    )
    group.add_argument(
        "--cache-dtype", choices=DTYPES, default="float16", help="dtype of --teacher-cache"
    )
    group.add_argument("--method", choices=METHODS, default="lora", help="what trains")
    group.add_argument("--rank", type=positive, default=4, help="rank of LoRA, and its alpha")
    group.add_argument(
        "--targets", nargs="+", default=["qkv"], help="layers of the image encoder for LoRA"
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help="a folder with train.csv, val.csv, test.csv")
    group.add_argument("--test-table", default="test.csv", help="table of the test images")
    group.add_argument("--images", type=Path, help="instead of --data: a folder of images")
    group.add_argument("--masks", type=Path, help="with --images: masks of the same names")
    group.add_argument("--prompts", choices=("mixed", "boxes", "points"), default="mixed")
    group.add_argument("--points", type=positive, default=1, help="points of a prompt in training")
    group.add_argument("--eval-prompts", choices=("boxes", "points"), default="boxes")
    group.add_argument("--eval-points", type=positive, default=5, help="the same in evaluation")

    group = parser.add_argument_group("InfoSAM")
    group.add_argument("--alpha", type=float, default=2.0, help="order of the Rényi entropy")
    group.add_argument("--compression-weight", type=float, default=1.0)
    group.add_argument("--distillation-weight", type=float, default=0.5)
    if models:
        group.add_argument("--no-infosam", action="store_true", help="without distilling")
    parser.set_defaults(no_infosam=False, package=package)

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=10)
    group.add_argument(
        "--batch-size",
        type=positive,
        default=4,
        help="images of a step of each process; the Gram matrices are over those of all processes",
    )
    group.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        help="batches for a step of the optimiser; this does not enlarge the Gram matrices",
    )
    group.add_argument("--lr", type=float, default=2e-4, help="falls to a tenth by a cosine")
    group.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no")
    group.add_argument("--legacy-loss", action="store_true", help="that of the released code")
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, required=True, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on with the run in --output")
    group.add_argument("--workers", type=int, default=2, help="processes that read images")
    group.add_argument("--threads", type=positive, default=torch.get_num_threads())
    group.add_argument("--log-every", type=positive, default=10, help="batches to a row of the log")
    group.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    options = parser.parse_args(argv)

    given = [folder is not None for folder in (options.data, options.images, options.masks)]
    if given not in ([True, False, False], [False, True, True]):
        parser.error("give either --data or both --images and --masks")
    if models:
        for name in ("", "teacher_"):
            model = getattr(options, name.rstrip("_") or "model")
            if model not in (None, "tiny") and getattr(options, f"{name}checkpoint") is None:
                parser.error(f"--{name.replace('_', '-')}checkpoint is needed for {model}")
    torch.set_num_threads(options.threads)
    return options


def positive(text: str) -> int:
    """Return the number that the text says, a whole one above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def accelerate(options: argparse.Namespace) -> Accelerator:
    """Return the accelerator that was asked for, and silence all processes but the main one.

    Raises:
        ValueError: If the device lacks the precision, or if a step sees a single image.
    """
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.cpu,
        # Even batches would repeat images, so that all processes get as many, and an evaluation
        # would count those twice. In training the last batches are left out if they are too few for
        # all processes.
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    options.processes = accelerator.num_processes
    batch = options.batch_size * options.processes
    if options.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU, on a CPU use bf16")
    if options.no_infosam:
        return accelerator
    if batch < 2:
        raise ValueError(
            "--batch-size must be at least 2 on one process: InfoSAM compares the samples"
        )
    if options.accumulate > 1:
        print(
            f"Gradients of {options.accumulate} batches are added up; the Gram matrices stay "
            f"{batch} x {batch}, those of one batch."
        )
    return accelerator


def from_main_process(
    function: Callable[[argparse.Namespace], T], options: argparse.Namespace
) -> T:
    """Call a function on the main process; return its value, or raise its error, on all of them."""
    error, outcome = None, [None, ""]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(options)
        except ValueError as raised:
            error, outcome[1] = raised, str(raised)
    broadcast_object_list(outcome)
    result, message = outcome
    if message:
        raise error or ValueError(message)
    return result


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with a message, and without a traceback, if what the user gave is wrong."""
    try:
        yield
    except ValueError as error:
        first = os.environ.get("RANK", "0") == "0"
        sys.exit(f"error: {error}" if first else 1)


def read_splits(options: argparse.Namespace) -> data.Splits:
    """Return the rows of the three splits after checking them.

    Raises:
        ValueError: If there are too few rows, or if the options are those of a run with other rows.
        DataError: If anything is wrong with the files.
    """
    if options.data is not None:
        splits = data.read_tables(options.data, options.test_table)
    else:
        splits = data.read_folders(options.images, options.masks)
    data.check(splits)
    names = [[row.image.name, row.label.name] for s in ("train", "val") for row in splits[s]]
    trained_on = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    if getattr(options, "trained_on", trained_on) != trained_on:
        raise ValueError(
            "the images for training and validation are not those of the run: with others, some it "
            "has been trained on may be tested"
        )
    options.trained_on = trained_on
    if len(splits["train"]) < options.batch_size * options.processes:
        raise ValueError(
            f"--batch-size must be at most the number of training images, {len(splits['train'])}, "
            f"over that of processes, {options.processes}, got {options.batch_size}"
        )
    return splits


def open_run(options: argparse.Namespace) -> Path | None:
    """Make the folder of the run and return None, or return the checkpoint to resume from.

    Raises:
        ValueError: If the folder holds something else than a run, a finished run, or a run that was
            started with other options.
    """
    asked = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in FREE
    }
    path = options.output / "options.json"
    if not path.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        if any(options.output.iterdir()):
            raise ValueError(f"--output must be a new or empty folder, got {options.output}")
        checkpoint.write_json(path, asked)
        return None
    if not options.resume:
        raise ValueError(f"{options.output} holds a run. Go on with --resume, or name another.")
    if (options.output / "result.json").exists():
        raise ValueError(f"{options.output} holds a finished run, see result.json there.")
    before = checkpoint.read_json(path)
    if before["trained_on"] != asked["trained_on"]:
        raise ValueError("--resume must go on with the same images for training and validation")
    changed = [name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name)]
    if changed:
        lines = [f"--{n.replace('_', '-')} was {before.get(n)}, is {asked.get(n)}" for n in changed]
        raise ValueError(f"--resume must go on with the same options: {'; '.join(sorted(lines))}")
    return checkpoint.latest(options.output)
