"""How strong the losses that were tried are beside the loss of the masks.

`python benchmarks/evidence/gauge.py RUN --epoch 20` takes the student of a run without a distiller
after that epoch, and each batch of its training images once. It prints the norm of each loss's
gradient at the image embedding, times the loss's weight, as a share of that of the masks' loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetuning"))

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from candidates import CANDIDATES, OnSource
from parts.data.batches import MaskedImages, collate
from parts.data.prompts import draw_prompts
from parts.data.tables import read_tables
from parts.distillers.base import Pass
from parts.distillers.choice import KINDS
from parts.distillers.collecting import Collector
from parts.models.segmenter import Segmenter
from parts.options import DISTILLERS
from parts.runs.trained import load_run, load_teacher
from parts.training.loss import structure_loss

INFOSAM = "infosam"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for InfoSAM and for each loss that was tried and sees the target's images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the --output of the fine-tuning program")
    parser.add_argument("--epoch", type=int, help="another epoch than the best")
    options = parser.parse_args(argv)
    student, asked = load_run(options.run, options.epoch)
    teacher = load_teacher(options.run)
    torch.manual_seed(0)
    losses = {INFOSAM: KINDS[INFOSAM](student.dim)}
    weights = {INFOSAM: DISTILLERS[INFOSAM]}
    for name, (kind, weight) in CANDIDATES.items():
        if kind is not OnSource:
            losses[name], weights[name] = kind.build(asked, teacher, student), weight
    shares: dict[str, list[float]] = {name: [] for name in losses}
    for of_teacher, of_student, masks, of_masks in passes(teacher, student, asked):
        for name, loss in losses.items():
            value = loss(of_teacher, of_student, masks)
            (gradient,) = torch.autograd.grad(value, of_student.embedding, retain_graph=True)
            shares[name].append((weights[name] * gradient.norm() / of_masks.norm()).item())
    print("| loss | weight | share of the masks' gradient | of single batches |")
    print("|---|---|---|---|")
    for name, found in shares.items():
        batches = f"{min(found):.2f} to {max(found):.2f}"
        print(f"| {name} | {weights[name]:g} | {mean(found):.2f} | {batches} |")


def passes(
    teacher: Segmenter, student: Segmenter, asked: argparse.Namespace
) -> Iterator[tuple[Pass, Pass, Tensor, Tensor]]:
    """Yield for each batch what both passes left, the masks, and the masks' gradient."""
    student.decoder.requires_grad_()  # so that a graph leads to the embedding
    student.encoder.requires_grad_()
    images = MaskedImages(read_tables(asked.data)["train"], student.frame)
    batches = DataLoader(images, asked.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    with Collector(teacher) as from_teacher, Collector(student) as from_student:
        for batch in batches:
            prompts = draw_prompts(asked.prompts, asked.points, batch)
            with torch.no_grad():
                logits = teacher(batch.images, prompts)
            of_teacher = from_teacher.pop(logits)
            of_student = from_student.pop(student(batch.images, prompts))
            of_masks = structure_loss(of_student.logits, batch.masks, batch.valid)
            (gradient,) = torch.autograd.grad(of_masks, of_student.embedding, retain_graph=True)
            yield of_teacher, of_student, batch.masks, gradient


if __name__ == "__main__":
    main()
