"""InfoSAM: relations share information (Zhang et al., ICML 2025)."""

from __future__ import annotations

from torch import Tensor, nn

from parts.distillers.base import EMBEDDING, TOKENS, Distiller, Pass
from parts.distillers.relations import relation_of
from renyi_kd import (
    Features,
    InfoSAMDistiller,
    linear_kernel,
    normalize_gram,
    renyi_joint_entropy,
)


class InfoSAM(InfoSAMDistiller):
    """The loss of the library, as the training loop calls it. It does what a `Distiller` does."""

    needs = (EMBEDDING, TOKENS)
    least_batch = 2
    terms_of_last: dict[str, Tensor]

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        terms = self.terms(*(Features(p.embedding, p.tokens) for p in (teacher, student)))
        self.terms_of_last = {
            name: value.detach() for name, value in terms._asdict().items() if name != "loss"
        }
        return terms.loss

    def figures(self) -> dict[str, Tensor]:
        """Return the terms of the last loss, and what to watch."""
        return self.terms_of_last


class UnregularizedInfoSAM(Distiller):
    """What is left of InfoSAM without the regularisation terms, as in the paper's Table 12.

    Its appendix names log2 of the squared norms of G_imr, of the teacher's G_r and of the student's
    G_r. The first one and the second one are all that Eq. 11 has. What Eq. 12 has left is the
    alignment, the joint entropy of the two relations.

    Args:
        relation: The relation module of teacher and student.
        alpha: Order of the entropy.
        weight: What the joint entropy is multiplied by.
    """

    needs = (EMBEDDING, TOKENS)
    least_batch = 2

    def __init__(self, relation: nn.Module, alpha: float, weight: float) -> None:
        super().__init__()
        self.relation, self.alpha, self.weight = relation, alpha, weight

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        grams = [
            normalize_gram(linear_kernel(relation_of(self.relation, p.embedding, p.tokens)))
            for p in (teacher, student)
        ]
        return self.weight * renyi_joint_entropy(*grams, alpha=self.alpha)
