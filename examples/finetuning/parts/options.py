"""The command line of the scripts.

It imports nothing that takes time, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
TEST_TABLE = "test.csv"
FORMATS = ("png", "pdf", "svg")  # of figures
METHODS = (
    *("lora", "lora-heads", "adapter", "adaptformer", "conv-lora"),
    *("su-sam-series", "su-sam-parallel", "su-sam-mixed", "su-sam-lora", "hq-sam", "bitfit"),
    "decoder",
)
# Each with the weight of its loss, see docs/compared-systems.md.
DISTILLERS = {
    "infosam": 1.0,
    "logit": 1.0,
    "pkd": 6.0,
    "pkt": 3e4,
    "ibd": 1.0,
    "vid": 1.0,
    "semckd": 50.0,
    "reviewkd": 1.0,
    "tinysam": 1.0,
    "mobilesam": 1.0,
    "tinysam-relation": 1.0,
    "mobilesam-relation": 4096.0,
    "none": 0.0,
}
WITH_LAYERS = ("ibd", "vid", "semckd", "reviewkd")
WITH_RELATION = ("infosam", "tinysam-relation", "mobilesam-relation")
RELATIONS = (
    "attention-1",
    "attention-1-normalized",
    "attention-3",
    "attention-5",
    "linear",
    "dot-product",
)
CACHE_DTYPES = ("float16", "bfloat16")
SAM_MODELS = ("vit_b", "vit_l", "vit_h", "small", "tiny")
SAM2_SIZES = ("t", "s", "b+", "l")
SAM2_MODELS = (*(f"{v}_hiera_{size}" for v in ("sam2.1", "sam2") for size in SAM2_SIZES), "tiny")
MOST_POINTS = 1000  # of a prompt
LARGEST = 1e30  # so that float32 can hold products of it
TRACKERS = ("tensorboard", "wandb", "trackio")
SMALL_TRANSFORMERS = ("tiny-sam", "tiny-sam2")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
MODELS = {"sam": SAM_MODELS, "sam2": SAM2_MODELS}


def parse_training(
    description: str, argv: Sequence[str] | None, package: str
) -> argparse.Namespace:
    """Read the command line of a fine-tuning script; the defaults are the paper's.

    Args:
        description: What the script does.
        argv: The arguments, by default those of the process.
        package: Name of the file beside this one that builds the model.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("model")
    if package in MODELS:
        models = MODELS[package]
        group.add_argument("--model", choices=models, required=True)
        group.add_argument("--checkpoint", type=place, help="official weights of --model")
        group.add_argument("--teacher", choices=models, help="a teacher of another size")
        group.add_argument("--teacher-checkpoint", type=place, help="official weights of --teacher")
    else:
        small = ", ".join(SMALL_TRANSFORMERS)
        group.add_argument(
            "--model",
            type=model_folder,
            required=True,
            help=f"{small}, a folder, or owner/name of a model on the Hugging Face Hub",
        )
        group.add_argument("--teacher", type=model_folder, help="a teacher of another size")
        parser.set_defaults(checkpoint=None, teacher_checkpoint=None)
    group.add_argument(
        "--teacher-cache", type=place, help="folder for the teacher's image embeddings"
    )
    group.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, default="float16", help="dtype of --teacher-cache"
    )
    group.add_argument("--method", choices=METHODS, default="lora", help="what trains")
    group.add_argument("--rank", type=whole(1), default=4, help="rank of LoRA, and its alpha")
    group.add_argument(
        "--targets", nargs="+", default=["qkv"], help="layers of the image encoder for LoRA"
    )
    group.add_argument(
        "--hq-checkpoint", type=place, help="a released HQ-SAM that --method hq-sam starts from"
    )

    group = parser.add_argument_group("data")
    add_data(group)
    group.add_argument(
        "--augment",
        action="store_true",
        help="flip, crop and recolour training images at random, as the paper does not",
    )
    group = parser.add_argument_group("prompts")
    points = whole(1, MOST_POINTS)
    group.add_argument("--prompts", choices=("mixed", "boxes", "points"), default="mixed")
    group.add_argument("--points", type=points, default=1, help="points of a prompt in training")
    group.add_argument("--eval-prompts", choices=("boxes", "points"), default="boxes")
    group.add_argument("--eval-points", type=points, default=5, help="the same in evaluation")

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distiller", choices=DISTILLERS, default="infosam", help="none trains without distilling"
    )
    group.add_argument(
        "--distiller-weight", type=number(0), help="weight of its loss; each has its own default"
    )
    for option, model in (("--layers", "student"), ("--teacher-layers", "teacher")):
        group.add_argument(
            option,
            type=whole(0),
            nargs="+",
            help=f"blocks of the {model} to compare, where a distiller compares blocks; by default "
            "those of global attention, or of SAM2 the last of each stage",
        )
    group.add_argument(
        "--relation", choices=RELATIONS, default="attention-1", help="the relation module"
    )
    group.add_argument(
        "--relation-from", type=place, help="a run whose relation module this one starts from"
    )
    group.add_argument(
        "--freeze-relation", action="store_true", help="leave the relation module as it is"
    )
    group = parser.add_argument_group("InfoSAM")
    group.add_argument("--alpha", type=order, default=2.0, help="order of the Renyi entropy")
    group.add_argument("--compression-weight", type=number(0), default=1.0)
    group.add_argument("--distillation-weight", type=number(0), default=0.5)
    group.add_argument(
        "--without-regularization",
        action="store_true",
        help="the joint entropy of the relations alone, as in the paper's Table 12",
    )
    parser.set_defaults(package=package)
    group = parser.add_argument_group("controls, to compare a distiller with")
    group.add_argument(
        "--start-weight",
        type=number(0),
        default=0.0,
        help="weight of the squared distance of what trains from where it started (L2-SP)",
    )
    group.add_argument(
        "--shuffled-teacher",
        action="store_true",
        help="give the teacher the embedding of the image before in the batch",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=whole(1, 10**6), default=10, help="may grow with --resume")
    group.add_argument(
        "--batch-size",
        type=whole(1),
        default=4,
        help="images of a step of each process; the Gram matrices are over those of all processes",
    )
    group.add_argument(
        "--accumulate",
        type=whole(1),
        default=1,
        help="batches for a step of the optimiser; this does not enlarge the Gram matrices",
    )
    group.add_argument(
        "--lr", type=number(0, exclusive=True), default=2e-4, help="falls to a tenth by a cosine"
    )
    group.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no")
    group.add_argument(
        "--validate-every", type=whole(1), default=1, help="epochs from a checkpoint to the next"
    )
    losses = group.add_mutually_exclusive_group()
    losses.add_argument("--legacy-loss", action="store_true", help="that of the released code")
    losses.add_argument("--point-loss", action="store_true", help="that of HQ-SAM, at points")
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)

    group = parser.add_argument_group("run")
    group.add_argument("--output", type=place, required=True, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on with the run in --output")
    group.add_argument("--workers", type=whole(0, 1024), default=2, help="processes that read")
    group.add_argument("--threads", type=whole(1, 1024), help="by default PyTorch's own choice")
    group.add_argument("--log-every", type=whole(1), default=10, help="batches to a row of the log")
    group.add_argument(
        "--track",
        nargs="*",
        choices=TRACKERS,
        default=["tensorboard"],
        help="who else gets the figures of the log; without a name, nobody",
    )
    group.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    options = parser.parse_args(argv)

    require_data(parser, options)
    for model, flag, weights in (
        (options.model, "--checkpoint", options.checkpoint),
        (options.teacher, "--teacher-checkpoint", options.teacher_checkpoint),
    ):
        if package in MODELS and model not in (None, "tiny") and weights is None:
            parser.error(f"{flag} is needed for {model}")
    if options.teacher is None and options.teacher_checkpoint is not None:
        parser.error("--teacher-checkpoint needs --teacher, which says of what size it is")
    if options.hq_checkpoint is not None and options.method != "hq-sam":
        parser.error(f"--hq-checkpoint needs --method hq-sam, got {options.method}")
    if options.augment and options.teacher_cache is not None:
        parser.error(
            "--teacher-cache keeps what the teacher sees of an image, which --augment changes in "
            "every epoch; leave one of them out"
        )
    check_distillation(parser, options)
    return options


def check_distillation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Give the loss its default weight; end the program if an option would have no effect."""
    name = options.distiller
    if options.distiller_weight is None:
        options.distiller_weight = DISTILLERS[name]
    elif name == "none":
        parser.error("--distiller-weight needs a --distiller, got none")
    users = {
        "layers": WITH_LAYERS,
        "teacher_layers": WITH_LAYERS,
        "relation": WITH_RELATION,
        "relation_from": WITH_RELATION,
        "freeze_relation": WITH_RELATION,
        "alpha": ("infosam",),
        "compression_weight": ("infosam",),
        "distillation_weight": ("infosam",),
        "without_regularization": ("infosam",),
        # Layers are collected before the embedding is shuffled.
        "shuffled_teacher": tuple(n for n in DISTILLERS if n not in ("none", *WITH_LAYERS)),
    }
    for option, names in users.items():
        if name not in names and getattr(options, option) != parser.get_default(option):
            flag = option.replace("_", "-")
            parser.error(f"--{flag} needs --distiller {' or '.join(names)}, got {name}")
    if options.shuffled_teacher and options.batch_size < 2:
        parser.error("--shuffled-teacher needs a --batch-size of at least 2")
    if options.relation == "dot-product" and (options.relation_from or options.freeze_relation):
        parser.error("--relation dot-product has no weights to start from or to freeze")
    if options.without_regularization and options.compression_weight != 1.0:
        parser.error("--compression-weight has no effect with --without-regularization")


def add_data(group: argparse._ArgumentGroup) -> None:
    """Add where the images and masks are, and how they are read."""
    group.add_argument("--data", type=place, help="a folder with train.csv, val.csv, test.csv")
    group.add_argument("--test-table", default=TEST_TABLE, help="table of the test images")
    group.add_argument("--images", type=place, help="instead of --data: a folder of images")
    group.add_argument("--masks", type=place, help="with --images: masks of the same names")
    group.add_argument("--coco", type=place, help="with --images: a file of COCO's instances")
    group.add_argument(
        "--foreground",
        type=values,
        nargs="+",
        default=[],
        help="values of a mask that are the object, such as 2 or 128-255, where it has several",
    )
    group.add_argument(
        "--ignore",
        type=values,
        nargs="+",
        default=[],
        help="values of a mask that are neither object nor background",
    )
    add_image_range(group)


def require_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program unless the options say where images and masks are."""
    names = ("data", "images", "masks", "coco")
    given = {name for name in names if getattr(options, name) is not None}
    if given not in ({"data"}, {"images", "masks"}, {"images", "coco"}):
        parser.error("give either --data or both --images and --masks, or --images and --coco")


def add_image_range(group: argparse._ActionsContainer) -> None:
    """Add what is black and what is white in images with more than 8 bits."""
    group.add_argument(
        "--image-range",
        type=number(),
        nargs=2,
        action=Rising,
        metavar=("LOW", "HIGH"),
        help="values of images with more than 8 bits, such as 0 4095",
    )


class Rising(argparse.Action):
    """Two numbers, of which the second is the larger one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the numbers, or end the program."""
        low, high = values
        if low >= high:
            parser.error(f"{option_string} must rise, got {low:g} and {high:g}")
        setattr(namespace, self.dest, values)


def add_moved(parser: argparse.ArgumentParser, *, data: bool) -> None:
    """Add where the weights of a run are, and its data, if they are not where they were.

    Their names start with `moved_`, as a program may have `--images` of its own.
    """
    group = parser.add_argument_group("if something has moved since the run")
    places = {
        "checkpoint": "the official weights",
        "teacher-checkpoint": "those of the teacher",
        "model": "the folder of a transformers model",
        "teacher": "that of the teacher",
    }
    if data:
        places |= {"data": "the folder of tables", "images": "the folder of images"}
        places |= {"masks": "the folder of masks", "coco": "the file of COCO's instances"}
    for name, meaning in places.items():
        dest = f"moved_{name.replace('-', '_')}"
        group.add_argument(f"--{name}", dest=dest, type=place, metavar="PATH", help=meaning)


def next_command(program: str, *arguments: object) -> str:
    """Return a sentence with the command that would come next."""
    absolute = str(Path(__file__).parents[1] / program)
    path = min(os.path.relpath(absolute), absolute, key=len)
    return f"Next: {shlex.join(['python', path, *map(str, arguments)])}"


def place(text: str) -> Path:
    """Return the path that the text names, from wherever the program will be later."""
    return Path(text).absolute()


def model_folder(text: str) -> str:
    """Return the name of a small model or of one on the Hub, or the path of a folder."""
    is_name = text in SMALL_TRANSFORMERS or (HUB_NAME.fullmatch(text) and not Path(text).exists())
    return text if is_name else str(place(text))


def values(text: str) -> tuple[float, float]:
    """Return the range that a value such as `2`, or a range such as `128-255`, stands for."""
    low, dash, high = text.partition("-")
    try:
        span = float(low), float(high if dash else low)
    except ValueError:
        span = (1.0, 0.0)
    if not 0 <= span[0] <= span[1] < math.inf:
        raise argparse.ArgumentTypeError(
            f"must be a value such as 2 or a range such as 128-255, got {text}"
        )
    return span


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a function that reads a whole number within these bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text}") from None
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return read


def number(least: float = -LARGEST, *, exclusive: bool = False) -> Callable[[str], float]:
    """Return a function that reads a finite number that is not too small."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
        if not abs(value) <= LARGEST:  # nan is not either
            raise argparse.ArgumentTypeError(f"must be finite and within {LARGEST:g}, got {text}")
        if value < least or (exclusive and value == least):
            bound = "above" if exclusive else "at least"
            raise argparse.ArgumentTypeError(f"must be {bound} {least:g}, got {text}")
        return value

    return read


def check_shares(parser: argparse.ArgumentParser, shares: Sequence[float]) -> None:
    """End with an error unless no share of `--average` is above 1."""
    if any(share > 1 for share in shares):
        parser.error(f"--average must be from 0 to 1, got {max(shares):g}")


def order(text: str) -> float:
    """Return a Renyi order: a number above zero, or infinity."""
    return math.inf if text in ("inf", "infinity") else number(0, exclusive=True)(text)
