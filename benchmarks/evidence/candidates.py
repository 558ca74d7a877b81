"""Losses that were tried and are not in the library, for the fine-tuning programs.

`python benchmarks/evidence/candidates.py examples/finetuning/finetune_sam.py --distiller anchor
...` runs a program of `examples/finetuning` with the distillers of this page beside its own.
`evidence.py candidates` compares them; candidates.md says what was expected of each.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetuning"))

import torch
import torch.nn.functional as F
from torch import Tensor

from anchoring import divergence, squares
from parts.data.batches import Batch, MaskedImages
from parts.data.prompts import Prompts, draw_points
from parts.data.tables import read_tables
from parts.distillers.base import EMBEDDING, LOGITS, TOKENS, Distiller, Pass
from parts.distillers.choice import KINDS
from parts.distillers.logit import divergence as soft_divergence
from parts.distillers.logit import two_classes
from parts.models.segmenter import Segmenter
from parts.models.tiny_sam import DIM
from parts.options import DISTILLERS
from parts.training.loss import structure_loss
from renyi_kd import (
    DotProductRelation,
    RelationModule,
    SampleGram,
    cauchy_schwarz_divergence,
    cka,
    infosam_terms,
    linear_kernel,
    normalize_gram,
    renyi_joint_entropy,
)

STEPS = 300  # of a run
SHARE, MOST = 0.5, 100.0  # of the gradient of the masks' loss, and the largest weight for it

Apart = Callable[[Tensor, Tensor], Tensor]


def clipped_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squares of cosines whose negative ones are set to zero, an option of DINOv3."""
    one, other = ((x @ x.mT).relu() for x in map(places, (student, teacher)))
    return (one - other).square().mean((1, 2))


def misalignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Return what the centred alignment of the Gram matrices lacks to 1, as PaKA does."""
    return 1 - cka(*(SampleGram(places(x)) for x in (student, teacher)))


def places(embedding: Tensor) -> Tensor:
    """Return the places of an embedding (B, D, h, w) as rows of unit length, (B, P, D)."""
    return F.normalize(embedding.flatten(2).mT, dim=-1)


class Anchor(Distiller):
    """The places of an image are alike as they are to the teacher.

    Attributes:
        apart: What tells the Gram matrices of two embeddings' places apart.
    """

    needs = (EMBEDDING,)
    apart: ClassVar[Apart] = staticmethod(divergence)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        return self.apart(student.embedding, teacher.embedding).mean()


class AnchorBySquares(Anchor):
    """The same by squared differences."""

    apart = staticmethod(squares)


class AnchorByClippedSquares(Anchor):
    """The same by squared differences, of positive cosines alone."""

    apart = staticmethod(clipped_squares)


class AnchorByAlignment(Anchor):
    """The same of places from which their mean is subtracted."""

    apart = staticmethod(misalignment)


class AnchorOfTokens(Distiller):
    """The same, where a place counts as much as the teacher's mask tokens attend to it."""

    needs = (EMBEDDING, TOKENS)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        pixels = teacher.embedding.flatten(2)
        scores = teacher.tokens @ pixels / pixels.shape[1] ** 0.5
        weight = scores.softmax(-1).mean(1)[..., None].sqrt()
        grams = (SampleGram(weight * places(p.embedding)) for p in (student, teacher))
        return cauchy_schwarz_divergence(*grams).mean()


class Warmed(Distiller):
    """The anchor, whose weight rises over a third of the steps."""

    needs = (EMBEDDING,)

    def __init__(self) -> None:
        super().__init__()
        self.anchor, self.done = Anchor(), 0

    def weight(self, done: float) -> float:
        """Return the weight, given how much of the training is done, from 0 to 1."""
        return min(3 * done, 1.0)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        weight = self.weight(self.done / STEPS)
        self.done += 1
        return weight * self.anchor(teacher, student, masks)


class Faded(Warmed):
    """The anchor, whose weight falls to nothing."""

    def weight(self, done: float) -> float:
        """Return the weight."""
        return max(1 - done, 0.0)


class Balanced(Distiller):
    """The anchor, whose gradient at the embedding is a share of that of the masks' loss."""

    needs = (EMBEDDING, LOGITS)

    def __init__(self) -> None:
        super().__init__()
        self.anchor = Anchor()

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        loss = self.anchor(teacher, student, masks)
        norms = [
            torch.autograd.grad(one, student.embedding, retain_graph=True)[0].norm()
            for one in (structure_loss(student.logits, masks), loss)
        ]
        # At the start there is nothing to hold, and the gradient is that of rounding.
        return (SHARE * norms[0] / norms[1]).nan_to_num().clamp(max=MOST) * loss


class OverBatch(Distiller):
    """A divergence of the relations' Gram matrices over the batch, in place of InfoSAM's loss.

    The relation is the dot product. One that learns could make the divergence zero by itself, and
    one that learned by compression alone would collapse.

    Attributes:
        apart: What tells the Gram matrices of the teacher and of the student apart.
    """

    needs = (EMBEDDING, TOKENS)
    least_batch = 2
    apart: ClassVar[Apart] = staticmethod(cauchy_schwarz_divergence)

    def __init__(self) -> None:
        super().__init__()
        self.relation = DotProductRelation()

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        relations = (self.relation(p.embedding.flatten(2).mT, p.tokens) for p in (teacher, student))
        grams = (normalize_gram(linear_kernel(relation.flatten(1))) for relation in relations)
        return self.apart(*grams)


def self_normalised(teacher: Tensor, student: Tensor) -> Tensor:
    """Return I(t; t) + I(s; s) - 2 I(t; s), which is zero for equal Gram matrices at order 2.

    There it is the Cauchy-Schwarz divergence of the matrices whose entries are squared. The
    entropies of one matrix cancel, and joint ones are left.
    """
    pairs = ((teacher, teacher), (student, student), (teacher, student))
    own, others, shared = (renyi_joint_entropy(*pair) for pair in pairs)
    return 2 * shared - own - others


class OverBatchByInformation(OverBatch):
    """The same by what the relations' information lacks to that of each with itself."""

    apart = staticmethod(self_normalised)


class Remembering(Distiller):
    """InfoSAM over this batch and past ones, whose relations are kept and pass no gradient.

    Attributes:
        rows: Samples of the Gram matrices.
    """

    needs = (EMBEDDING, TOKENS)
    rows: ClassVar[int] = 32

    def __init__(self) -> None:
        super().__init__()
        self.relation = RelationModule(DIM)
        self.past: list[Tensor] = []

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss, which is zero as long as there is a single sample."""
        now = [
            *(self.relation(p.embedding.flatten(2).mT, p.tokens) for p in (teacher, student)),
            *(teacher.embedding, teacher.tokens),
        ]
        samples = now
        if self.past:
            samples = [torch.cat(x)[: self.rows] for x in zip(now, self.past, strict=True)]
        self.past = [x.detach() for x in samples]
        if len(samples[0]) < 2:
            return 0 * now[1].sum()
        return infosam_terms(*samples).loss


class RememberingMore(Remembering):
    """The same over more samples."""

    rows = 64


class Elsewhere(Distiller):
    """Beside the object, masks by a point are those of the teacher, compared as for `Logit`.

    Fine-tuning asks for one object of each picture. What else the decoder could do is tied to
    nothing, and is what it forgets first.

    Args:
        teacher: The teacher.
        student: The student, whose decoder is asked once more.
    """

    needs = (EMBEDDING,)

    def __init__(self, teacher: Segmenter, student: Segmenter) -> None:
        super().__init__()
        # Copies with the same weights, as the hooks that collect features are not to see this. A
        # tuple, so that these models are no parts of this module.
        same = {id(weight): weight for model in (teacher, student) for weight in model.parameters()}
        self.models = copy.deepcopy((teacher, student), same)

    @classmethod
    def build(
        cls, options: argparse.Namespace, teacher: Segmenter, student: Segmenter
    ) -> Distiller:
        """Return the distiller of a run."""
        return cls(teacher, student)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        everywhere = torch.ones_like(masks)
        batch = Batch(masks, ~masks, everywhere, masks, [], [], [])
        prompts = draw_points(1, batch)
        return self.of_masks([student.embedding], [teacher.embedding], prompts)

    def of_masks(self, found: list[Tensor], wanted: list[Tensor], prompts: Prompts) -> Tensor:
        """Return the divergence of the masks, given what the encoders have found."""
        of_teacher, of_student = self.models
        with torch.autocast(wanted[-1].device.type, torch.bfloat16):
            with torch.no_grad():
                expected = of_teacher.decode(wanted, prompts)
            logits = of_student.decode(found, prompts)
        return soft_divergence(*(two_classes(x.float()) for x in (logits, expected)), 3.0)


class OnSource(Elsewhere):
    """On other pictures than the target's, masks by a point anywhere are those of the teacher.

    Args:
        teacher: The teacher.
        student: The student, which sees the other pictures as well.
        pictures: A folder with tables, of which the training split is used, without its masks.
    """

    def __init__(self, teacher: Segmenter, student: Segmenter, pictures: Path) -> None:
        super().__init__(teacher, student)
        rows = {row.image: row for row in read_tables(pictures)["train"]}
        self.images = MaskedImages([*rows.values()], student.frame)

    @classmethod
    def build(
        cls, options: argparse.Namespace, teacher: Segmenter, student: Segmenter
    ) -> Distiller:
        """Return the distiller; the source lies beside the folder of the target's images."""
        image = read_tables(options.data)["train"][0].image
        source = next(p / "general" for p in image.parents if (p / "general").is_dir())
        return cls(teacher, student, source)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss over as many pictures as the batch has."""
        chosen = torch.randint(len(self.images), (len(masks),)).tolist()
        images = torch.stack([self.images[i][0] for i in chosen]).to(masks.device)
        of_teacher, of_student = self.models
        with torch.autocast(masks.device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = of_teacher.encode(images)
            found = of_student.encode(images)
        points = of_student.frame.size * torch.rand(len(images), 1, 2, device=images.device)
        labels = torch.ones_like(points[..., 0], dtype=torch.int)
        return self.of_masks(found, wanted, Prompts(points=points, labels=labels))


# Each with a weight that makes its gradient at the embedding some half of that of the masks' loss
# after 120 steps of plain fine-tuning on 24 images of rice, at the learning rate of plain.
CANDIDATES: dict[str, tuple[type[Distiller], float]] = {
    "anchor": (Anchor, 10.0),
    "anchor-squares": (AnchorBySquares, 25.0),
    "anchor-clipped": (AnchorByClippedSquares, 25.0),
    "anchor-alignment": (AnchorByAlignment, 5.0),
    "anchor-tokens": (AnchorOfTokens, 10.0),
    "anchor-warmed": (Warmed, 10.0),
    "anchor-faded": (Faded, 10.0),
    "anchor-balanced": (Balanced, 1.0),
    "batch-divergence": (OverBatch, 0.1),
    "batch-information": (OverBatchByInformation, 0.25),
    "memory-32": (Remembering, 1.0),
    "memory-64": (RememberingMore, 1.0),
    "elsewhere": (Elsewhere, 0.1),
    "on-source": (OnSource, 0.1),
}


def main() -> None:
    """Run the program that is named first, with the other arguments."""
    for name, (kind, weight) in CANDIDATES.items():
        KINDS[name], DISTILLERS[name] = kind, weight
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
