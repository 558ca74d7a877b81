"""Which route serves which entropies: a table of it is in the README."""

from collections.abc import Sequence
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from renyi_kd._precision import compute_dtype, ieee_dtype
from renyi_kd.information.routes.eigenvalues import (
    Method,
    choose_method,
    spectral_entropy,
    trace_one,
)
from renyi_kd.information.routes.frobenius import Subset, entropies_by_tiles
from renyi_kd.information.routes.lanczos import estimated_entropy, estimated_entropy_of_samples
from renyi_kd.information.routes.powers import entropy_by_powers
from renyi_kd.information.routes.quadrature import Lanczos
from renyi_kd.information.routes.tiles import Progress, streamed_entropies
from renyi_kd.information.samples import SampleGram, entropy_of_dual, has_dual

# From this n on, routes with few passes over a matrix and no copies of it are faster, and samples
# need no matrix.
LARGE = 512

# The largest order whose products may be float32: eigenvalues from 1 / sqrt(n) to sqrt(n), to this
# power, stay within its range.
_MAX_FLOAT32_POWER = 8


def entropies_in_bits(
    grams: Sequence[Tensor | SampleGram],
    subsets: Sequence[Subset],
    alpha: float,
    method: Method | Lanczos | None,
    progress: Progress | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Joint entropies of subsets of Gram matrices, and their standard errors if they are estimates.

    Args:
        grams: `n x n` each; leading dimensions broadcast.
        subsets: for each entropy the indices of the matrices whose joint it is of.
        alpha: Rényi order.
        method: see `renyi_entropy`.
        progress: see `renyi_entropy`.

    Returns:
        Entropies in bits, float64, shape `(...)` each; errors likewise, or None.
    """
    if method == "lanczos":
        method = Lanczos()
    if isinstance(method, Lanczos):
        method.sizes(alpha, grams[0].shape[-1])
        groups = [[grams[v] for v in subset] for subset in subsets]
        pairs = [_estimate(group, alpha, method, progress) for group in groups]
        return [bits for bits, _ in pairs], [error for _, error in pairs]

    method = choose_method(alpha, method)
    found: dict[Subset, Tensor] = {}
    for subset in subsets:
        samples = [x for x in (grams[v] for v in subset) if isinstance(x, SampleGram)]
        if len(samples) == len(subset) and has_dual(samples):
            found[subset] = entropy_of_dual(samples, alpha, method)
    rest = [subset for subset in subsets if subset not in found]
    if rest:
        used = sorted({v for subset in rest for v in subset})
        renamed = [tuple(used.index(v) for v in subset) for subset in rest]
        entropies = _without_dual([grams[v] for v in used], renamed, alpha, method, progress)
        found.update(zip(rest, entropies, strict=True))
    return [found[subset] for subset in subsets], None


def _estimate(
    grams: Sequence[Tensor | SampleGram], alpha: float, options: Lanczos, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    samples = _of_one_shape([x for x in grams if isinstance(x, SampleGram)])
    if len(samples) == len(grams):
        return estimated_entropy_of_samples(samples, alpha, options, progress)
    matrices = _matrices(grams)
    if len(matrices) == 1:
        return estimated_entropy(matrices[0], alpha, options)
    matrix = reduce(mul, map(trace_one, matrices)).to(compute_dtype(*matrices))
    return estimated_entropy(matrix, alpha, options)


def _without_dual(
    grams: Sequence[Tensor | SampleGram],
    subsets: Sequence[Subset],
    alpha: float,
    method: Method,
    progress: Progress | None,
) -> Sequence[Tensor]:
    large = grams[0].shape[-1] >= LARGE
    samples = [x for x in grams if isinstance(x, SampleGram)]
    if method == "frobenius" and large and len(samples) == len(grams):
        return streamed_entropies(_of_one_shape(samples), subsets, progress).unbind()
    matrices = _matrices(grams)
    # What torch.compile makes of the plain operators needs no tiles.
    large = large and not torch.compiler.is_compiling()
    if method == "frobenius" and large and len({x.shape for x in matrices}) == 1:
        return entropies_by_tiles(matrices, subsets).unbind()
    # Samples are what they are, but entries have been rounded.
    epsilons = [
        torch.finfo(torch.float64 if isinstance(x, SampleGram) else compute_dtype(x)).eps
        for x in grams
    ]
    return [
        _entropy(
            [matrices[v] for v in subset],
            alpha,
            method,
            epsilon=max(epsilons[v] for v in subset),
            large=large,
        )
        for subset in subsets
    ]


def _entropy(
    grams: Sequence[Tensor], alpha: float, method: Method, *, epsilon: float, large: bool
) -> Tensor:
    if method == "power" and large and len(grams) == 1:
        products = ieee_dtype(grams[0].dtype, grams[0].device)
        if alpha > _MAX_FLOAT32_POWER:
            products = torch.float64
        return entropy_by_powers(grams[0], int(alpha), products)
    joint = trace_one(grams[0])
    if len(grams) > 1:
        joint = trace_one(reduce(mul, map(trace_one, grams[1:]), joint))
    return spectral_entropy(joint, alpha, method, epsilon=epsilon)


def _matrices(grams: Sequence[Tensor | SampleGram]) -> list[Tensor]:
    return [x.matrix() if isinstance(x, SampleGram) else x.to(compute_dtype(x)) for x in grams]


def _of_one_shape(grams: Sequence[SampleGram]) -> list[SampleGram]:
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in grams))  # type: ignore[no-untyped-call]
    return [
        x  # the usual case, for which no kernel is checked again
        if x.shape[:-2] == batch
        else SampleGram(x.x.expand(*batch, *x.x.shape[-2:]), x.kernel, **x.options)
        for x in grams
    ]
