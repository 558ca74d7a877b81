"""The test images of a run, what models make of them, and which of them are worth a look."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from parts.data.batches import Batch, MaskedImages, collate
from parts.data.prompts import Prompts
from parts.data.reading import read_image, reading_of
from parts.data.tables import Row
from parts.evaluation.metrics import dice_and_iou
from parts.evaluation.scores import fixed_prompts, predictions
from parts.models.segmenter import Segmenter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Chosen = dict[int, str]  # rows of the test table, and why they are drawn


class Picture(NamedTuple):
    """An image with its object and its prompt."""

    rgb: NDArray[np.uint8]  # (H, W, 3)
    truth: Tensor  # (H, W), bool
    prompt: Prompts  # one, in pixels of the image
    name: str  # why it is there, and its file


class Gallery(NamedTuple):
    """The test images, and how every model is asked for them: as the first run was."""

    rows: list[Row]
    options: argparse.Namespace

    def batches(self, model: Segmenter, chosen: Collection[int] | None = None) -> Iterator[Batch]:
        """Yield the batches of the evaluation; if rows are chosen, those with one of them alone."""
        images = MaskedImages(self.rows, model.frame, reading_of(self.options))
        places = range(len(images))
        for start in range(0, len(images), self.options.batch_size):
            batch = places[start : start + self.options.batch_size]
            if chosen is None or not set(batch).isdisjoint(chosen):
                yield collate([images[i] for i in batch]).to(DEVICE)

    def asked(self, batch: Batch) -> Prompts:
        """Return the prompts of a batch, which hang on the batch if they are points."""
        return fixed_prompts(self.options.eval_prompts, self.options.eval_points, batch)

    def logits(
        self, model: Segmenter, chosen: Collection[int] | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield row, mask logits (H, W) and truth (H, W) of the images of `batches`."""
        asked = self.options.eval_prompts, self.options.eval_points
        return predictions(model, self.batches(model, chosen), *asked)

    def ious(self, model: Segmenter, title: str) -> list[float]:
        """Return the IoU of every image."""
        progress = tqdm(self.logits(model), title[-30:], len(self.rows), ncols=80)
        return [dice_and_iou(logits > 0, truth)[1] for _, logits, truth in progress]

    def masks(self, model: Segmenter, chosen: Collection[int]) -> dict[int, Tensor]:
        """Return the mask of each chosen row, bool (H, W)."""
        found = self.logits(model, chosen)
        return {row: (logits > 0).cpu() for row, logits, _ in found if row in chosen}

    def pictures(self, model: Segmenter, chosen: Chosen) -> dict[int, Picture]:
        """Return the chosen rows with the prompts that the model is asked by, in their order."""
        reading, found = reading_of(self.options), {}
        for batch in self.batches(model, chosen):
            boxes, points, labels = self.asked(batch)
            for i, row in enumerate(batch.index):
                if row not in chosen:
                    continue
                truth = batch.truths[i].cpu()
                scale = model.frame.boxes(torch.ones(4), *truth.shape)
                if boxes is not None:
                    prompt = Prompts(boxes[i].cpu() / scale)
                else:
                    prompt = Prompts(None, points[i].cpu() / scale[:2], labels[i].cpu())
                rgb = read_image(self.rows[row].image, reading).rgb
                name = f"{chosen[row]}\n{self.rows[row].image.name}"
                found[row] = Picture(rgb, truth, prompt, name)
        return {row: found[row] for row in chosen}


def extremes(values: Sequence[float] | NDArray[np.float64], count: int) -> Chosen:
    """Return so many best, median and worst rows, in this order; of few rows, no row twice."""
    order = np.argsort(-np.asarray(values), kind="stable").tolist()
    best, worst = order[:count], order[count:][-count:]
    rest = order[count : max(count, len(order) - count)]
    median = rest[max(0, (len(rest) - count) // 2) :][:count]
    names = {"best": best, "median": median, "worst": worst}
    return {row: name for name, rows in names.items() for row in rows}
