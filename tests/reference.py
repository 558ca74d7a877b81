"""The quantities of the InfoSAM paper in float64 NumPy, each straight from its equation.

Written from the paper alone and free of PyTorch and of the library, so that an error in either
shows as a difference. One matrix at a time; all entropies in bits.
"""

import numpy as np

LN2 = np.log(2)
EPS = np.finfo(np.float64).eps


def linear_kernel(x, y=None):  # Eq. 19
    return x @ (x if y is None else y).T


def polynomial_kernel(x, y=None, *, degree, offset=1.0):
    return (linear_kernel(x, y) + offset) ** degree


def rbf_kernel(x, y=None, *, bandwidth=None):
    distance = distances(x, x if y is None else y, 2)
    return np.exp(-(distance**2) / (2 * (bandwidth or median_distance(x, 2)) ** 2))


def laplacian_kernel(x, y=None, *, bandwidth=None):
    distance = distances(x, x if y is None else y, 1)
    return np.exp(-distance / (bandwidth or median_distance(x, 1)))


def distances(x, y, order):
    return np.linalg.norm(x[:, None] - y[None], ord=order, axis=-1)


def median_distance(x, order):
    """The median over pairs i < j; one if that is zero or there is no pair."""
    pairs = distances(x, x, order)[np.triu_indices(len(x), 1)]
    return (np.median(pairs) if pairs.size else 0.0) or 1.0


def normalize_gram(gram):
    """Def. 1; zero samples equal each other and are orthogonal to the rest."""
    norms = np.sqrt(np.diag(gram))
    zero = norms == 0
    norms = np.where(zero, 1.0, norms)
    return np.where(np.outer(zero, zero), 1.0, gram / np.outer(norms, norms)) / len(gram)


def entropy_of_spectrum(p, alpha):
    """Eq. 1 from the eigenvalues alone, in forms that cancel nowhere."""
    p = np.sort(p[p > 0]) / np.sum(p[p > 0])
    log_p = np.log(p)
    log_p[-1] = np.log1p(-np.sum(p[:-1]))  # the largest may be one but for the others
    if alpha == 1:
        return -np.sum(p * log_p) / LN2
    if alpha == np.inf:
        return -log_p[-1] / LN2
    if abs(alpha - 1) < 0.1:  # sum p^alpha = 1 + sum p (p^(alpha-1) - 1)
        log_sum = np.log1p(np.sum(p * np.expm1((alpha - 1) * log_p)))
    else:  # sum p^alpha = p_max^alpha (1 + sum over the others of (p / p_max)^alpha)
        log_sum = alpha * log_p[-1] + np.log1p(np.sum((p[:-1] / p[-1]) ** alpha))
    return log_sum / ((1 - alpha) * LN2)


def trace_one(gram):
    """Symmetrised; a zero matrix as the limit of adding a constant to the kernel."""
    return (gram + gram.T) / 2 / np.trace(gram) if gram.any() else np.full_like(gram, 1 / len(gram))


def renyi_entropy(gram, alpha=2.0):  # Eq. 1
    p = np.linalg.eigvalsh(trace_one(gram))
    return entropy_of_spectrum(np.where(p > len(p) * EPS * p[-1], p, 0.0), alpha)


def renyi_joint_entropy(*grams, alpha=2.0):  # Eq. 2, 16
    return renyi_entropy(np.prod([trace_one(gram) for gram in grams], axis=0), alpha)


def renyi_conditional_entropy(gram, given, alpha=2.0):
    return renyi_joint_entropy(gram, given, alpha=alpha) - renyi_entropy(given, alpha)


def renyi_mutual_information(gram_x, gram_y, alpha=2.0):  # Eq. 3, 17
    x, y = (side if isinstance(side, list) else [side] for side in (gram_x, gram_y))
    joint, of_x, of_y = (renyi_joint_entropy(*grams, alpha=alpha) for grams in (x + y, x, y))
    return of_x + of_y - joint


def renyi_total_correlation(*grams, alpha=2.0):  # Yu et al. 2019
    return sum(renyi_entropy(gram, alpha) for gram in grams) - renyi_joint_entropy(
        *grams, alpha=alpha
    )


def renyi_entropy_gradient(gram, alpha):
    """The derivative of S_alpha(K / tr K) in K; at alpha <= 1 on the range of K, zero beyond it.

    The chain alpha A^(alpha-1) / ((1-alpha) ln 2 tr A^alpha), less its part along the trace, is
    alpha (p^(alpha-1) / tr A^alpha - 1) / ((1-alpha) ln 2) on an eigenvector of eigenvalue p.
    """
    p, v = np.linalg.eigh(trace_one(gram))
    on_range = p > len(p) * EPS * p[-1]
    if alpha == np.inf:
        slope = (1 - (np.arange(len(p)) == len(p) - 1) / p[-1]) / LN2
    else:
        exponent = np.log(np.where(on_range, p, 1.0)) + LN2 * renyi_entropy(gram, alpha)
        chain = -exponent if alpha == 1 else alpha * np.expm1((alpha - 1) * exponent) / (1 - alpha)
        slope = np.where(on_range, chain, alpha / (alpha - 1) if alpha > 1 else 0.0) / LN2
    return (v * slope) @ v.T / np.trace(gram)


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def unit_length(relation):
    """Each sample of (B, N, P) over the norm of all its entries; a zero sample stays zero."""
    norm = np.sqrt((relation**2).sum((1, 2), keepdims=True))
    return relation / np.where(norm == 0, 1.0, norm)


def dot_product_relation(image_embedding, mask_tokens):  # Tables 4 and 13
    return unit_length(mask_tokens @ image_embedding.swapaxes(1, 2))


def attention_relation(image_embedding, mask_tokens, parameters, residual="raw"):
    """Eq. 8 and 9 for (B, P, D) and (B, N, D); parameters as in the module's state_dict."""
    w = parameters
    feat = layer_norm(image_embedding, w["layer_norm_feat.weight"], w["layer_norm_feat.bias"])
    mask = layer_norm(mask_tokens, w["layer_norm_mask.weight"], w["layer_norm_mask.bias"])
    query = mask @ w["query_proj.weight"].T + w["query_proj.bias"]
    key = feat @ w["key_proj.weight"].T + w["key_proj.bias"]
    left, right = (mask_tokens, image_embedding) if residual == "raw" else (mask, feat)
    scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1]) + left @ right.swapaxes(1, 2)
    return unit_length(scores)


def infosam_terms(
    teacher_relation,
    student_relation,
    image_embedding,
    mask_tokens,
    *,
    alpha=2.0,
    compression_weight=1.0,
    distillation_weight=0.5,
):
    """Eq. 10 to 14 at order alpha, and the figures to log, by the names of InfoSAMTerms."""
    r_t, r_s, z_i, z_m = (
        normalize_gram(linear_kernel(z.reshape(len(z), -1)))  # Eq. 20
        for z in (teacher_relation, student_relation, image_embedding, mask_tokens)
    )
    compression = renyi_entropy(r_t, alpha) - renyi_joint_entropy(z_i, z_m, r_t, alpha=alpha)
    distilled = renyi_mutual_information(r_t, r_s, alpha)
    same_shape = teacher_relation.shape == student_relation.shape
    return {
        "loss": compression_weight * compression - distillation_weight * distilled,  # Eq. 14
        "compression": compression,  # Eq. 10, 11
        "distillation": -distilled,  # Eq. 12, 13
        "compressed_information": renyi_mutual_information([z_i, z_m], r_t, alpha),
        "distilled_information": distilled,
        "teacher_relation_entropy": renyi_entropy(r_t, alpha),
        "student_relation_entropy": renyi_entropy(r_s, alpha),
        "teacher_feature_entropy": renyi_joint_entropy(z_i, z_m, alpha=alpha),
        "relation_cosine": (
            (unit_length(teacher_relation) * unit_length(student_relation)).sum((1, 2)).mean()
            if same_shape
            else np.nan
        ),
    }
