"""The loss as Algorithm 1 of the paper writes it: what the library is compared with.

Everything is materialised: normalised and projected maps, normalised copies for the Gram matrices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from renyi_kd import RelationModule

Pair = tuple[Tensor, Tensor]


def entropy(gram: Tensor, alpha: float) -> Tensor:
    """Eq. 1 by eigenvalues; Eq. 22, by the Frobenius norm, at alpha 2."""
    if alpha == 2:
        return -torch.linalg.matrix_norm(gram).square().log2()
    return entropy_by_eigenvalues(gram, alpha)


def entropy_by_eigenvalues(gram: Tensor, alpha: float) -> Tensor:
    """Eq. 1 as it stands."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).pow(alpha).sum().log2() / (1 - alpha)


def attention_relation(module: RelationModule, features: Pair) -> Tensor:
    """Eq. 8 and 9, flattened and of unit length, (B, N * P)."""
    image_embedding, mask_tokens = features
    pixels = image_embedding.flatten(2).transpose(1, 2)
    query = module.query_proj(module.layer_norm_mask(mask_tokens))
    key = module.key_proj(module.layer_norm_feat(pixels))
    scores = query @ key.mT / module.dim**0.5 + mask_tokens @ pixels.mT
    return F.normalize(scores.flatten(1))


def infosam_loss(module: RelationModule, teacher: Pair, student: Pair, alpha: float) -> Tensor:
    """Algorithm 1 with weights 1 and 0.5."""
    relation_t, relation_s = (
        attention_relation(module, teacher),
        attention_relation(module, student),
    )
    gram_t, gram_s = relation_t @ relation_t.T, relation_s @ relation_s.T
    normalized_i, normalized_m = (F.normalize(x.flatten(1)) for x in teacher)
    gram_i, gram_m = normalized_i @ normalized_i.T, normalized_m @ normalized_m.T

    entropy_t, entropy_s, entropy_imt, entropy_ts = (
        entropy(gram / gram.trace(), alpha)
        for gram in (gram_t, gram_s, gram_i * gram_m * gram_t, gram_t * gram_s)
    )
    compression = entropy_t - entropy_imt
    distillation = entropy_ts - entropy_t - entropy_s
    return compression + 0.5 * distillation
