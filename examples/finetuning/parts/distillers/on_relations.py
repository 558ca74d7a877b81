"""TinySAM and MobileSAM with relations in place of features, as in the paper's Table 5.

The paper does not say what trains the relation module there. Here the loss does, unless the module
is frozen.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from parts.distillers.base import EMBEDDING, LOGITS, TOKENS, Distiller, Pass
from parts.distillers.relations import relation_of
from parts.distillers.tinysam import hard_masks


class MobileSAMOnRelations(Distiller):
    """The mean squared distance of the relations.

    Args:
        relation: The relation module of teacher and student.
    """

    needs = (EMBEDDING, TOKENS)

    def __init__(self, relation: nn.Module) -> None:
        super().__init__()
        self.relation = relation

    def relations(self, teacher: Pass, student: Pass) -> tuple[Tensor, Tensor]:
        """Return the student's relation and the teacher's, each (B, N P) of unit length."""
        of_student, of_teacher = (
            relation_of(self.relation, p.embedding, p.tokens) for p in (student, teacher)
        )
        return of_student, of_teacher

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        return F.mse_loss(*self.relations(teacher, student))


class TinySAMOnRelations(MobileSAMOnRelations):
    """The absolute distance of the relations, and of the masks as in `TinySAM`."""

    needs = (EMBEDDING, TOKENS, LOGITS)

    def forward(self, teacher: Pass, student: Pass, masks: Tensor) -> Tensor:
        """Return the loss."""
        of_relations = F.l1_loss(*self.relations(teacher, student))
        return of_relations + hard_masks(student.logits, teacher.logits, masks)
