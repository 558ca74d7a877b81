r"""Order 2 of RBF kernels of samples, without their matrices (InfoSAM, Eq. 22).

The diagonal of an RBF kernel is constant. The square of a Hadamard product of RBF kernels is the
product of the same kernels of a bandwidth smaller by :math:`\sqrt 2`. So the entropy of a joint of
variables s is that of a sum:

.. math:: S_2 = -\log_2 \frac{1}{n^2} \sum_{ij} E^s_{ij}, \qquad
    E^s_{ij} = \prod_{v \in s} \exp(-\lVert z^v_i - z^v_j \rVert^2 / 2), \qquad
    z^v = \sqrt 2\, x^v / \sigma_v

Few samples have their products kept for backward. Many are gone through tile by tile, and once more
in backward.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import gradients_by_operators, needs_plain_formulas
from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import Subset, hadamard_product, rbf_kernel, signed_sum
from renyi_kd.information.products import upper_tiles
from renyi_kd.information.rbf import (
    PulledSamples,
    exponentials,
    gram_by_operators,
    scaled_samples,
)
from renyi_kd.information.routes.tiles import Progress
from renyi_kd.information.samples import SampleGram

# The width of a tile. On a CPU some should fit into the cache, on a GPU each costs launches.
_WIDTH, _WIDTH_ON_GPU = 512, 4096


def are_rbf(grams: Sequence[SampleGram]) -> bool:
    """Return whether all are RBF kernels."""
    return all(gram.kernel is rbf_kernel for gram in grams)


def sum_of_entropies_of_rbf(
    grams: Sequence[SampleGram],
    signs: Sequence[int],
    subsets: Sequence[Subset],
    progress: Progress | None,
) -> Tensor:
    """Return a sum of joint entropies of order 2 of RBF kernels, each times its sign.

    Args:
        grams: of the same number of samples; leading dimensions broadcast.
        signs: of the entropies.
        subsets: for each entropy the numbers of the kernels it is of.
        progress: see `renyi_entropy`.

    Returns:
        The sum in bits, float64, shape `(...)`. It has second derivatives, for which matrices are
        made.
    """
    dtype = compute_dtype(*grams)
    samples = [_scaled_samples(gram, dtype) for gram in grams]
    shapes = [z.shape[:-2] for z in samples]
    if any(shape != shapes[0] for shape in shapes):
        batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        samples = [z.expand(*batch, *z.shape[-2:]) for z in samples]
    keep = torch.is_grad_enabled() and _are_few(samples, subsets)
    total: Tensor = _SumOfEntropies.apply(signs, subsets, progress, keep, *samples)
    return total


def _scaled_samples(gram: SampleGram, dtype: torch.dtype) -> Tensor:
    bandwidth = gram.bandwidth(order=2.0) * math.sqrt(0.5)
    return scaled_samples(gram.x.to(dtype), bandwidth, by_product=_by_product(dtype))


def _by_product(dtype: torch.dtype) -> bool:
    return dtype != torch.float64


class _SumOfEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        signs: Sequence[int],
        subsets: Sequence[Subset],
        progress: Progress | None,
        keep: bool,
        *samples: Tensor,
    ) -> Tensor:
        n = samples[0].shape[-2]
        kept = []
        sums: list[list[Tensor]] = [[] for _ in subsets]
        for tile in _products(samples, subsets, progress):
            i, j, products = tile
            for parts, product in zip(sums, products, strict=True):
                total = product.sum(dim=-1).sum(dim=-1, dtype=torch.float64)
                parts.append(total if i == j else 2 * total)
            if keep:
                kept.append(tile)
        ctx.sums = torch.stack([reduce(add, parts) for parts in sums])
        ctx.signs, ctx.subsets, ctx.progress, ctx.kept = signs, subsets, progress, kept
        ctx.save_for_backward(*samples)
        logarithms = signed_sum(signs, ctx.sums.log2().unbind())
        return 2 * math.log2(n) * sum(signs) - logarithms

    @staticmethod
    def backward(ctx: Any, grad_bits: Tensor) -> tuple[Tensor | None, ...]:
        samples, subsets = ctx.saved_tensors, ctx.subsets
        if torch.is_grad_enabled() or needs_plain_formulas(grad_bits):
            plain = partial(_sum_by_operators, ctx.signs, subsets)
            return None, None, None, None, *gradients_by_operators(plain, samples, grad_bits)
        # By an entry of a product, counted twice: it moves each of its two samples.
        slopes = (grad_bits * (-2 / math.log(2)) / ctx.sums).to(samples[0].dtype)[..., None, None]
        wanted = [v for v, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        pulled = {
            v: PulledSamples(samples[v], by_product=_by_product(samples[v].dtype)) for v in wanted
        }
        for i, j, products in ctx.kept or _products(samples, subsets, ctx.progress):
            for v in wanted:
                terms = [
                    (sign, product, slope)
                    for sign, subset, product, slope in zip(
                        ctx.signs, subsets, products, slopes.unbind(), strict=True
                    )
                    if v in subset
                ]
                pulled[v].add(i, j, _weighted_sum(terms))
        gradients = {v: pulled[v].total() for v in wanted}
        return None, None, None, None, *(gradients.get(v) for v in range(len(samples)))


def _weighted_sum(terms: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return the sum of products of a sign and two tensors."""
    (sign, product, slope), *others = terms
    total = product * (slope if sign == 1 else sign * slope)
    for sign, product, slope in others:
        total.addcmul_(product, slope, value=sign)
    return total


def _are_few(samples: Sequence[Tensor], subsets: Sequence[Subset]) -> bool:
    """Return whether upper tiles of all products take as much memory as a tile or the samples."""
    n = samples[0].shape[-2]
    return n <= _width(samples[0]) or n * len(subsets) <= 2 * sum(z.shape[-1] for z in samples)


def _width(x: Tensor) -> int:
    return _WIDTH if x.is_cpu else _WIDTH_ON_GPU


def _products(
    samples: Sequence[Tensor], subsets: Sequence[Subset], progress: Progress | None
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield the rows and the columns of each upper tile, and all products' entries there."""
    n = samples[0].shape[-2]
    tiles = upper_tiles(n, _width(samples[0]))
    for i, j in tiles if progress is None else progress(tiles):
        pairs = ((z, z) if len(tiles) == 1 else (z[..., i, :], z[..., j, :]) for z in samples)
        by_product = _by_product(samples[0].dtype)
        kernels = [exponentials(*pair, by_product=by_product) for pair in pairs]
        yield i, j, [hadamard_product(kernels, subset) for subset in subsets]


def _sum_by_operators(signs: Sequence[int], subsets: Sequence[Subset], *samples: Tensor) -> Tensor:
    by_product = _by_product(samples[0].dtype)
    kernels = [gram_by_operators(z, by_product=by_product) for z in samples]
    products = (hadamard_product(kernels, subset).double() for subset in subsets)
    return signed_sum(signs, (-product.mean(dim=(-2, -1)).log2() for product in products))
