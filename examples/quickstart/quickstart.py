"""Adapt a small SAM to a new domain by LoRA, without and with InfoSAM; a minute on a CPU.

The teacher has learnt everyday scenes, and the target domain looks like endoscopy. Two students
start from the teacher and see the same batches in the same order. The settings are those of the
paper: batch 4, 10 epochs, Adam with a learning rate that falls from 2e-4 to 2e-5, LoRA of rank 4,
and the decoder trained in full. Model and data are toys. Read the figures as a check that
everything works, not as a result.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

# The loss and the small SAM are those of the fine-tuning scripts, which lie in the next folder.
sys.path.append(str(Path(__file__).parents[1] / "finetuning"))

from parts.data.prompts import Prompts, noised
from parts.evaluation.panels import (
    colorbar,
    limits_of,
    picture_files,
    show_mask,
    show_note,
    show_outline,
    show_prompt,
    show_relation,
)
from parts.figures import BLUE, ORANGE
from parts.models.tiny_sam import DIM, predict
from parts.options import FORMATS
from parts.training.loss import structure_loss
from renyi_kd import FeatureCollector, InfoSAMDistiller, InfoSAMTerms
from scenes import Scene, box_fill, make_scenes
from teacher import ious, load_teacher, segment

BATCH_SIZE = 4


def make_student(teacher: Sam) -> Sam:
    """Return a copy of the teacher with LoRA in the image encoder and a decoder that trains."""
    student = copy.deepcopy(teacher)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"])
    student.image_encoder = get_peft_model(student.image_encoder, lora)
    student.mask_decoder.requires_grad_(True)
    return student


def finetune(
    teacher: Sam, scenes: Scene, steps: int, seed: int, distiller: InfoSAMDistiller | None
) -> tuple[Sam, float]:
    """Train a student, distilled or not; return it and the median time of a step in ms."""
    # With the same seed, both students have the same initial LoRA, batches and noise.
    torch.manual_seed(seed)
    student = make_student(teacher)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if distiller is not None:
        parameters += distiller.parameters()
    optimizer = torch.optim.Adam(parameters, lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=2e-5)
    data = TensorDataset(*map(torch.from_numpy, scenes))
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)
    batches = islice(chain.from_iterable(repeat(loader)), steps)
    progress = tqdm(batches, "student" if distiller is None else "student + InfoSAM", steps)

    seconds = []  # right on a CPU only: on a GPU, a step returns before it is done
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for images, masks, boxes in progress:
            started = time.perf_counter()
            boxes = noised(boxes)
            loss = structure_loss(predict(student, images, boxes), masks)
            student_features = from_student.pop()

            if distiller is not None:
                with torch.no_grad():
                    predict(teacher, images, boxes)
                loss = loss + distiller(from_teacher.pop(), student_features)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - started)
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return student.eval(), 1e3 * median(seconds)


@torch.no_grad()
def mean_terms(
    distiller: InfoSAMDistiller, teacher: Sam, student: Sam, scenes: Scene
) -> InfoSAMTerms:
    """Return the terms of the distiller, averaged over batches of the size used in training."""
    images, _, boxes = map(torch.from_numpy, scenes)
    every = []
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for batch in zip(images.split(BATCH_SIZE), boxes.split(BATCH_SIZE), strict=True):
            predict(teacher, *batch)
            predict(student, *batch)
            every.append(torch.stack(distiller.terms(from_teacher.pop(), from_student.pop())))
    return InfoSAMTerms(*torch.stack(every).mean(0))


def teacher_pass(teacher: Sam, scenes: Scene) -> float:
    """Return the median time of the teacher's pass over a batch in ms."""
    images, _, boxes = (torch.from_numpy(part[:BATCH_SIZE]) for part in scenes)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        with torch.no_grad():
            predict(teacher, images, boxes)
        seconds.append(time.perf_counter() - started)
    return 1e3 * median(seconds)


@torch.no_grad()
def relation_maps(distiller: InfoSAMDistiller, model: Sam, scenes: Scene) -> Tensor:
    """Return the relation of the mask token to each place of the embedding, shape (N, h, w)."""
    with FeatureCollector(model) as collector:
        segment(model, scenes)
        embedding, tokens = collector.pop()
    return distiller.relation(embedding, tokens).view(len(tokens), *embedding.shape[2:])


def draw(scenes: Scene, masks: dict[str, Tensor], relations: dict[str, Tensor], to: Path) -> None:
    """Draw a row for each scene: the picture with its prompt, truth, predictions and relations.

    Args:
        scenes: The scenes.
        masks: Of each model, the masks (N, H, W), by the title of their column.
        relations: Of each model, the relation maps (N, h, w), by the title of their column.
        to: The PNG file, beside which the same is written as PDF and SVG.
    """
    titles = ["image and prompt", "truth", *masks, *relations]
    rows = [f"scene {number}" for number in range(1, len(scenes.image) + 1)]
    scores = [ious(predicted, scenes) for predicted in masks.values()]
    limits = limits_of([*relations.values()])
    to.parent.mkdir(parents=True, exist_ok=True)
    path = to.with_suffix("")
    with picture_files(path, FORMATS, scenes.image, rows, titles, bar=True) as (figure, axes):
        for i, (line, image, mask, box) in enumerate(zip(axes, *scenes, strict=True)):
            truth = torch.from_numpy(mask)
            show_prompt(line[0], image, Prompts(torch.from_numpy(box)))
            show_mask(line[1], image, truth, ORANGE)
            for axis, predicted, found in zip(line[2:], masks.values(), scores, strict=False):
                show_mask(axis, image, predicted[i], BLUE)
                show_outline(axis, truth)
                show_note(axis, f"IoU {100 * found[i]:.0f} %")
            for axis, maps in zip(line[2 + len(masks) :], relations.values(), strict=True):
                cell = image.shape[0] / maps.shape[1], image.shape[1] / maps.shape[2]
                drawn = show_relation(axis, image, maps[i], cell, limits)
                show_outline(axis, truth, "black")
        colorbar(figure, drawn, axes)


def main(argv: Sequence[str] | None = None) -> None:
    """Train both students, print the results, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240, help="training steps of each student")
    parser.add_argument(
        "--samples", type=int, default=96, help="scenes of each set, a multiple of 4"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    output = Path(__file__).parent / "output" / "quickstart.png"
    parser.add_argument("--output", type=Path, default=output, help="the PNG file to write")
    args = parser.parse_args(argv)
    if args.samples < BATCH_SIZE or args.samples % BATCH_SIZE:
        parser.error(f"--samples must be a multiple of {BATCH_SIZE}, got {args.samples}")
    if min(args.steps, args.threads) < 1 or args.seed < 0:
        parser.error("--steps and --threads must be positive, --seed not negative")
    if args.output.suffix != ".png":
        parser.error(f"--output must end in .png, got {args.output}")
    torch.set_num_threads(args.threads)

    train = make_scenes("target", args.samples, seed=3 * args.seed)
    target = make_scenes("target", args.samples, seed=3 * args.seed + 1)
    source = make_scenes("source", args.samples, seed=3 * args.seed + 2)

    teacher = load_teacher()
    plain, step_ms = finetune(teacher, train, args.steps, args.seed, distiller=None)
    torch.manual_seed(args.seed)
    distiller = InfoSAMDistiller(dim=DIM)
    before = mean_terms(distiller, teacher, make_student(teacher), target)
    distilled, distilled_ms = finetune(teacher, train, args.steps, args.seed, distiller)

    models = {"teacher": teacher, "student": plain, "student + InfoSAM": distilled}
    masks = {name: segment(model, target) for name, model in models.items()}
    scores = {name: ious(mask, target).mean() for name, mask in masks.items()}
    print(f"\n{'mean IoU':20}{'target':>10}{'source':>10}")
    filled = [np.mean([*map(box_fill, scenes.mask)]) for scenes in (target, source)]
    print(f"{'filling the box':20}{filled[0]:10.3f}{filled[1]:10.3f}")
    for name, model in models.items():
        print(f"{name:20}{scores[name]:10.3f}{ious(segment(model, source), source).mean():10.3f}")

    every_terms = {"before training": before}
    for name in ("student", "student + InfoSAM"):
        every_terms[name] = mean_terms(distiller, teacher, models[name], target)
    print(f"\nInformation in bits, {np.log2(BATCH_SIZE):.0f} at most, over batches of {BATCH_SIZE}")
    print(f"{'':20}{'compressed':>12}{'distilled':>12}{'S(teacher relation)':>22}{'cosine':>10}")
    for name, terms in every_terms.items():
        print(f"{name:20}{terms.compressed_information:12.3f}", end="")
        print(f"{terms.distilled_information:12.3f}{terms.teacher_relation_entropy:22.3f}", end="")
        print(f"{terms.relation_cosine:10.3f}")

    print(f"S(image embedding, mask tokens) of the teacher: {before.teacher_feature_entropy:.3f}")

    extra_ms, teacher_ms = distilled_ms - step_ms, teacher_pass(teacher, train)
    print(f"\nMedian step: {step_ms:.0f} ms, and {extra_ms:.0f} ms more with InfoSAM", end=" ")
    print(f"({extra_ms / step_ms:.0%}): {teacher_ms:.0f} ms the teacher's pass,")
    print("the rest loss and relation module")

    few = Scene(*(part[:4] for part in target))
    columns = {
        f"{name}\nmean IoU {100 * scores[name]:.1f}\N{NO-BREAK SPACE}%": mask[:4]
        for name, mask in masks.items()
    }
    relations = {
        f"relation of\n{name}": relation_maps(distiller, models[name], few)
        for name in ("teacher", "student + InfoSAM")
    }
    draw(few, columns, relations, args.output)
    print(f"\nPicture: {args.output}, and beside it as PDF and SVG")


if __name__ == "__main__":
    main()
