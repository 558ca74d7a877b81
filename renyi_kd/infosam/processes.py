r"""Gram matrices over the samples of all ranks of a process group, without gathering the samples.

An inner product is a sum over features. So each rank is sent a slice of the feature axis of all
samples (all-to-all), makes partial Gram matrices of it, and these are added up (all-reduce).
Whatever the number of ranks, a rank sends its own features once; gathering would send them to each
of the others.

All ranks end up with the same matrices, and so with the same loss :math:`L`. Gradients follow the
convention of DistributedDataParallel, which averages over the ranks: each of :math:`R` ranks passes
back its part of the gradient of :math:`R L`, the sum of what all ranks call their loss.
"""

from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from renyi_kd._precision import compute_dtype
from renyi_kd.information.kernels import in_memory_order, memory_order


def check_group(process_group: object) -> None:
    """Raise unless it is None or a group that this process belongs to."""
    if process_group is None:
        return
    if dist.is_available():
        if isinstance(process_group, dist.ProcessGroup):
            return
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`process_group` must be a group that this process belongs to.")
    raise TypeError(
        f"`process_group` must be a torch.distributed.ProcessGroup, such as "
        f"torch.distributed.group.WORLD after init_process_group, or None, "
        f"got {type(process_group).__name__}."
    )


def slices_over_ranks(
    samples: dict[str, Tensor], options: tuple[float, ...], group: "dist.ProcessGroup"
) -> dict[str, Tensor]:
    """A slice of the features of the samples of all ranks, another one on each rank.

    Args:
        samples: by name, each of shape `(b, ...)`; `b` may differ between ranks, nothing else.
        options: numbers that must not differ between ranks either.
        group: the ranks.

    Returns:
        By name, each of shape `(B, f)`, in the order of the ranks.

    Raises:
        ValueError: on all ranks, if one has samples of another shape or dtype than the others, or
            other options.
    """
    sizes, one_layout = _agree(samples, options, group)
    # By itself the embedding keeps its dtype, and its order if that is the same on all ranks.
    embedding = samples["image_embedding"]
    rows = (in_memory_order(embedding) if one_layout else embedding).flatten(1)
    (of_embedding,) = _exchange([rows], sizes, group)
    small = {name: x.flatten(1) for name, x in samples.items() if name != "image_embedding"}
    dtype = compute_dtype(*small.values())
    of_small = _exchange([x.to(dtype) for x in small.values()], sizes, group)
    slices = dict(zip(small, of_small, strict=True), image_embedding=of_embedding)
    return {name: slices[name] for name in samples}


def sum_over_ranks(grams: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Sum of symmetric matrices, shape `(..., B, B)`, of all ranks, the same on each of them."""
    total: Tensor = _SumOverRanks.apply(grams, group)
    return total


def mean_over_ranks(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Mean of the values, shape `(b,)`, of all ranks."""
    sums = torch.stack([values.sum(), values.new_full((), len(values))])
    dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]


def averaging_gradients(module: nn.Module, group: "dist.ProcessGroup") -> dict[str, Tensor]:
    """The parameters of a module that train, by name; their gradients are means over the ranks."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        return {}
    return dict(zip(trained, _AveragedGradients.apply(group, *trained.values()), strict=True))


@torch.no_grad()
def broadcast(module: nn.Module, group: "dist.ProcessGroup") -> None:
    """Give all ranks the parameters and buffers of the first."""
    # Where the group can send from; the module may still be on the CPU.
    device = torch.device("cpu" if _sends_from_cpu(group) else "cuda")
    for tensor in filter(Tensor.numel, (*module.parameters(), *module.buffers())):
        # As bytes, since no backend sends every dtype and every memory layout.
        content = tensor.detach().to(device).contiguous().flatten().view(torch.uint8).clone()
        dist.broadcast(content, group=group, group_src=0)
        tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


def _agree(
    samples: dict[str, Tensor], options: tuple[float, ...], group: "dist.ProcessGroup"
) -> tuple[list[int], bool]:
    """Number of samples of each rank, and whether their image embeddings lie alike in memory."""
    embedding = samples["image_embedding"]
    # Of integers and floats alone, these are the same hashes in every process.
    kinds = [hash((*x.shape[1:], torch.finfo(x.dtype).eps)) for x in samples.values()]
    # The CPU needs the sizes now. If the group sends from there, it does not wait for the GPU.
    mine = torch.tensor(
        [len(embedding), hash(tuple(memory_order(embedding))), hash(options), *kinds],
        device="cpu" if _sends_from_cpu(group) else embedding.device,
    )
    found = mine.new_empty(dist.get_world_size(group) * len(mine))
    dist.all_gather_into_tensor(found, mine, group=group)
    sizes, layouts, asked, *kinds_of_ranks = found.view(-1, len(mine)).T.tolist()

    rank = dist.get_rank(group)
    if len(set(asked)) > 1:
        raise ValueError(
            f"`alpha` and the other options must be the same on all ranks, got {options} on this "
            f"rank, {rank}."
        )
    for (name, x), of_ranks in zip(samples.items(), kinds_of_ranks, strict=True):
        differing = [str(r) for r, kind in enumerate(of_ranks) if kind != of_ranks[rank]]
        if differing:
            raise ValueError(
                f"`{name}` must have samples of one shape and dtype on all ranks, got "
                f"{tuple(x.shape[1:])} and {x.dtype} on this rank, {rank}, but not on "
                f"{', '.join(differing)}."
            )
    return sizes, len(set(layouts)) == 1


def _sends_from_cpu(group: "dist.ProcessGroup") -> bool:
    return "cpu:" in dist.get_backend_config(group)


def _exchange(
    samples: list[Tensor], sizes: list[int], group: "dist.ProcessGroup"
) -> tuple[Tensor, ...]:
    """A slice `(B, f)` of each tensor `(b, F)`; the tensors have one dtype and travel together."""
    pieces = list(zip(*(x.tensor_split(len(sizes), dim=1) for x in samples), strict=True))
    widths = [[piece.shape[1] for piece in for_rank] for for_rank in pieces]
    # What one rank is sent lies together; a single tensor is not copied for that.
    rows = samples[0]
    if len(samples) > 1:
        rows = torch.cat([piece for for_rank in pieces for piece in for_rank], dim=1)
    columns: Tensor = _Exchange.apply(rows, [sum(w) for w in widths], sizes, group)
    return torch.split(columns, widths[dist.get_rank(group)], dim=1)


class _Exchange(torch.autograd.Function):
    """All features of own samples `(b, F)` for own features of all samples `(B, f)`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, widths: list[int], sizes: list[int], group: "dist.ProcessGroup"
    ) -> Tensor:
        # Weakly: a process that still holds a group when it ends may abort.
        ctx.widths, ctx.sizes, ctx.group = widths, sizes, ref(group)
        width = widths[dist.get_rank(group)]
        sent = torch.cat([piece.flatten() for piece in torch.split(rows, widths, dim=1)])
        received = sent.new_empty(sum(sizes), width)
        dist.all_to_all_single(
            received.view(-1),
            sent,
            [size * width for size in sizes],
            [len(rows) * width for width in widths],
            group=group,
        )
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank(group := ctx.group())
        size, width = ctx.sizes[rank], ctx.widths[rank]
        received = grad.new_empty(size * sum(ctx.widths))
        to_each, from_each = [n * width for n in ctx.sizes], [size * w for w in ctx.widths]
        dist.all_to_all_single(
            received, grad.contiguous().view(-1), from_each, to_each, group=group
        )
        pieces = [piece.view(size, -1) for piece in torch.split(received, from_each)]
        return torch.cat(pieces, dim=1), None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grams: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.world = dist.get_world_size(group)
        i, j = torch.triu_indices(*grams.shape[-2:], device=grams.device)
        halves = grams[..., i, j].contiguous()
        dist.all_reduce(halves, group=group)
        total = torch.empty_like(grams)
        total[..., i, j] = halves
        total[..., j, i] = halves
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # All ranks have the same loss and the same gradient: this is the sum of all.
        return grad * ctx.world, None


class _AveragedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: "dist.ProcessGroup", *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = ref(group)
        ctx.set_materialize_grads(False)  # a parameter that nothing uses keeps its grad None
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [grad for grad in grads if grad is not None]
        if not used:
            return None, *grads
        total = torch.cat([grad.flatten() for grad in used])
        dist.all_reduce(total, group=ctx.group())
        total /= dist.get_world_size(ctx.group())
        means = iter(torch.split(total, [grad.numel() for grad in used]))
        return None, *(
            None if grad is None else next(means).view_as(grad).to(grad.dtype) for grad in grads
        )
