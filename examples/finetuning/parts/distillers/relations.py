"""The relation modules of the paper's Table 13."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from renyi_kd import DotProductRelation, RelationModule


class LinearRelation(nn.Module):
    """A linear layer on the mask tokens, and inner products with the image embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.products = DotProductRelation()

    def forward(self, image_embedding: Tensor, mask_tokens: Tensor) -> Tensor:
        """Return the relation (B, N, P) of unit length a sample."""
        return self.products(image_embedding, self.linear(mask_tokens))


class StackedRelation(nn.Module):
    """Layers of attention from the mask tokens to the image embedding, then a `RelationModule`.

    The paper says no more than how many layers of attention there are, so these are the usual ones:
    the last one's scores are the relation.

    Args:
        dim: Channels of image embedding and mask tokens.
        layers: The number of layers, that of the `RelationModule` among them.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.pixel_norm = nn.LayerNorm(dim)
        self.token_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers - 1))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(dim, num_heads=1, batch_first=True) for _ in range(layers - 1)
        )
        self.last = RelationModule(dim)

    def forward(self, image_embedding: Tensor, mask_tokens: Tensor) -> Tensor:
        """Return the relation (B, N, P) of unit length a sample, for pixels (B, P, D)."""
        pixels = self.pixel_norm(image_embedding)
        for norm, attention in zip(self.token_norms, self.attentions, strict=True):
            found, _ = attention(norm(mask_tokens), pixels, pixels, need_weights=False)
            mask_tokens = mask_tokens + found
        return self.last(image_embedding, mask_tokens)


RELATIONS = {
    "attention-1": RelationModule,
    "attention-1-normalized": partial(RelationModule, residual="normalized"),
    "attention-3": partial(StackedRelation, layers=3),
    "attention-5": partial(StackedRelation, layers=5),
    "linear": LinearRelation,
    "dot-product": lambda dim: DotProductRelation(),
}


def relation_of(relation: nn.Module, embedding: Tensor, tokens: Tensor) -> Tensor:
    """Return the relation of an image embedding (B, D, h, w) and tokens, (B, N P)."""
    pixels = embedding.flatten(2).mT
    return F.normalize(relation(pixels, tokens).flatten(1), dim=1)
