"""Train the small teacher of the quickstart on everyday scenes, from scratch, on one CPU core.

It writes the weights, and beside them a page that says how they were made and how good they are.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor
from tqdm import trange

# The small SAM is that of the fine-tuning scripts, which lie in the next folder.
sys.path.append(str(Path(__file__).parents[1] / "finetuning"))

from parts.data.prompts import noised
from parts.models.tiny_sam import build_tiny_sam, predict
from scenes import SIZE, Scene, box_fill, everyday_scene, make_scenes
from teacher import WEIGHTS, ious, load_teacher, segment

# Batches are drawn from a pool, of which every step replaces the oldest few scenes by new ones. A
# scene is used four times on average, mirrored at random.
POOL, FRESH = 2048, 4
HELD_OUT_SEED, HELD_OUT = 1_000_000, 200


def augmented(images: Tensor, masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror a batch at random, and move the sides of the boxes by up to 5 % of their length."""
    boxes = noised(boxes)
    for axis in (1, 2):
        if torch.rand(()) < 0.5:
            low, high = (1, 3) if axis == 1 else (0, 2)
            images, masks, boxes = images.flip(axis), masks.flip(axis), boxes.clone()
            boxes[:, [low, high]] = SIZE - boxes[:, [high, low]]
    if torch.rand(()) < 0.5:
        images, masks, boxes = images.transpose(1, 2), masks.mT, boxes[:, [1, 0, 3, 2]]
    return images, masks, boxes


def bce_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return binary cross-entropy plus Dice loss, averaged over the batch."""
    masks, p = masks.float(), logits.sigmoid()
    dice = (2 * (p * masks).sum((1, 2)) + 1) / ((p + masks).sum((1, 2)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


def save(model: Sam, step: int, started: float, args: argparse.Namespace) -> None:
    """Write the weights, and into the same file how they were made."""
    facts = {
        "command": shlex.join(["python", "examples/quickstart/pretrain_teacher.py", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": f"{step} of {args.steps}, {args.batch_size} scenes each",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "torch": torch.__version__,
        "time": f"{(time.time() - started) / 60:.0f} min, {args.threads} thread(s)",
    }
    save_file(model.state_dict(), args.output, metadata={k: str(v) for k, v in facts.items()})


def write_page(weights: Path) -> str:
    """Measure the saved weights, write a page about them, and return its table of scores."""
    model = load_teacher(weights)
    with safe_open(weights, "pt") as file:
        facts = file.metadata()
    table = ["| domain | teacher | filling the box |", "|---|---|---|"]
    for domain in ("source", "target"):
        scenes = make_scenes(domain, HELD_OUT, HELD_OUT_SEED)
        iou = ious(segment(model, scenes), scenes).mean()
        fill = np.mean([*map(box_fill, scenes.mask)])
        table.append(f"| {domain} | {iou:.3f} | {fill:.3f} |")
    page = [
        f"# The small teacher: `{weights.name}`",
        "",
        "Made by `pretrain_teacher.py` from procedural everyday scenes (`scenes.py`) only.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {fact} |" for name, fact in sorted(facts.items())),
        "",
        f"Mean IoU over {HELD_OUT} held-out scenes of each domain (seed {HELD_OUT_SEED}), prompted",
        "with the exact box of the mask:",
        "",
        *table,
    ]
    weights.with_suffix(".md").write_text("\n".join(page) + "\n")
    return "\n".join(table)


def main() -> None:
    """Train the teacher, and save it from time to time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=11_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--evaluate", action="store_true", help="measure the saved weights again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        print(write_page(args.output))
        return

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    model = build_tiny_sam()
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, args.steps, pct_start=0.03, final_div_factor=100
    )
    pool = Scene(*map(torch.from_numpy, make_scenes("source", POOL, args.seed)))
    started = time.time()
    progress = trange(args.steps, desc="teacher", mininterval=5)
    for step in progress:
        for i in range(FRESH):
            for old, new in zip(pool, everyday_scene(rng), strict=True):
                old[(FRESH * step + i) % POOL] = torch.from_numpy(new)
        chosen = torch.randint(POOL, (args.batch_size,))
        images, masks, boxes = augmented(*(part[chosen] for part in pool))
        with torch.autocast("cpu", torch.bfloat16):
            logits = predict(model, images, boxes)
        loss = bce_dice_loss(logits.float(), masks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            save(model, step + 1, started, args)
            progress.write(f"step {step + 1}\n{write_page(args.output)}")


if __name__ == "__main__":
    main()
