r"""Gram matrices over the samples of all processes, without gathering the samples.

The processes of a group are its ranks. An inner product is a sum over features. So each rank is
sent a slice of the features of all samples (all-to-all) and makes partial Gram matrices of it, and
these are added up (all-reduce). Whatever the number of ranks, each sends its own features once.
Gathering the samples would send them to every other rank.

All ranks end up with the same matrices, and so with the same loss. DistributedDataParallel will
average the gradients of the ranks. Each rank computes the part of the gradient that its own samples
have, which is to be summed over the ranks, so it is multiplied by their number here.
"""

from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from renyi_kd._precision import compute_dtype
from renyi_kd.infosam.operators.batch_gram import in_memory_order, memory_order

# What a rank says after an error in place of its numbers: that of its samples, and hashes of their
# layout, of the options and of the four kinds of samples.
_FAILED = -1
_NUMBERS = 7


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


class GroupReference:
    """A weak reference to a group. A copy has the same one; a file holds none.

    It is weak, since a process that still holds a group when it ends may abort.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = None if group is None else ref(group)

    def __call__(self) -> "dist.ProcessGroup | None":
        """Return the group, or None if there is none any more."""
        return None if self._group is None else self._group()

    def __deepcopy__(self, memo: object) -> "GroupReference":
        return self

    def __reduce__(self) -> tuple[type["GroupReference"], tuple[()]]:
        return GroupReference, ()


class TellingRanks:
    """Makes an error inside, which comes before all that ranks exchange, one on all ranks.

    A class, since older versions of `torch.compile` do not trace generators of context managers.
    """

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        self.group = group

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self.group is not None:
            _gather([_FAILED] * _NUMBERS, self.group)


def slices_over_ranks(
    samples: dict[str, Tensor], options: tuple[float, ...], group: "dist.ProcessGroup"
) -> dict[str, Tensor]:
    """Return a slice of the features of the samples of all ranks, another one on each rank.

    Args:
        samples: by name, each of shape `(b, ...)`; `b` may differ between ranks, nothing else.
        options: numbers that must not differ between ranks either.
        group: the ranks.

    Returns:
        By name, each of shape `(B, f)`, in the order of the ranks.

    Raises:
        ValueError: on all ranks, if one has samples of another shape or dtype than the others, or
            other options.
        RuntimeError: on all other ranks, if one has raised an error inside of `TellingRanks`.
    """
    sizes, one_layout = _agree(samples, options, group)
    # The large embedding travels alone. So it keeps its dtype, and the order of its features in
    # memory if that is the same on all ranks. The small tensors are converted and travel together.
    embedding = samples["image_embedding"]
    rows = (in_memory_order(embedding) if one_layout else embedding).flatten(1)
    (embedding_slice,) = _exchange([rows], sizes, group)
    small = [x.flatten(1) for name, x in samples.items() if name != "image_embedding"]
    small_slices = _exchange([x.to(compute_dtype(*small)) for x in small], sizes, group)
    in_turn = iter(small_slices)
    return {
        name: embedding_slice if name == "image_embedding" else next(in_turn) for name in samples
    }


def sum_over_ranks(grams: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the sum over all ranks of symmetric matrices of shape `(..., B, B)`."""
    total: Tensor = _SumOverRanks.apply(grams, group)
    return total


def mean_over_ranks(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the mean of the values of all ranks, of shape `(b,)` on this one."""
    sums = torch.stack([values.sum(), values.new_full((), len(values))])
    dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]


def averaging_gradients(module: nn.Module, group: "dist.ProcessGroup") -> dict[str, Tensor]:
    """Return views of the parameters that train, by name; ranks average their gradients.

    Sharded parameters are left out, as `fully_shard` averages their gradients itself.
    """
    from torch.distributed.tensor import DTensor  # takes most of a second to import

    named = module.named_parameters()
    trained = {name: p for name, p in named if p.requires_grad and not isinstance(p, DTensor)}
    if not trained:
        return {}
    return dict(zip(trained, _AveragedGradients.apply(group, *trained.values()), strict=True))


@torch.no_grad()
def broadcast(module: nn.Module, group: "dist.ProcessGroup") -> None:
    """Give all ranks the parameters and buffers of the first."""
    # The module may still be on the CPU when the group sends from the GPU.
    device = torch.device("cpu" if _sends_from_cpu(group) else "cuda")
    for tensor in filter(Tensor.numel, (*module.parameters(), *module.buffers())):
        # It is sent as bytes, since no backend sends every dtype and every memory layout.
        content = tensor.detach().to(device).contiguous().flatten().view(torch.uint8).clone()
        dist.broadcast(content, group=group, group_src=0)
        tensor.copy_(content.view(tensor.dtype).view(tensor.shape))


def _agree(
    samples: dict[str, Tensor], options: tuple[float, ...], group: "dist.ProcessGroup"
) -> tuple[list[int], bool]:
    """Return each rank's number of samples, and whether all embeddings lie alike in memory."""
    embedding = samples["image_embedding"]
    # Python salts the hashes of strings, but those of numbers are the same in every process.
    kinds = [hash((*x.shape[1:], torch.finfo(x.dtype).eps)) for x in samples.values()]
    found = _gather(
        [len(embedding), hash(tuple(memory_order(embedding))), hash(options), *kinds], group
    )
    sizes, layouts, options_of_ranks, *kinds_of_ranks = found

    rank = dist.get_rank(group)
    if failed := [str(r) for r, size in enumerate(sizes) if size == _FAILED]:
        raise RuntimeError(
            f"Rank {', '.join(failed)} raised an error before its samples could be compared with "
            f"those of this rank, {rank}. See its output."
        )
    if len(set(options_of_ranks)) > 1:
        raise ValueError(
            f"`alpha` and the other options must be the same on all ranks, got {options} on this "
            f"rank, {rank}."
        )
    for (name, x), kinds_of_x in zip(samples.items(), kinds_of_ranks, strict=True):
        differing = [str(r) for r, kind in enumerate(kinds_of_x) if kind != kinds_of_x[rank]]
        if differing:
            raise ValueError(
                f"`{name}` must have samples of one shape and dtype on all ranks, got "
                f"{tuple(x.shape[1:])} and {x.dtype} on this rank, {rank}, but not on "
                f"{', '.join(differing)}."
            )
    layouts_of_samples = {layout for layout, size in zip(layouts, sizes, strict=True) if size}
    return sizes, len(layouts_of_samples) == 1 and layouts[rank] in layouts_of_samples


def _gather(mine: list[int], group: "dist.ProcessGroup") -> list[list[int]]:
    """Return each number of all ranks in turn."""
    # The CPU needs them now. If the group can send from there, it need not wait for the GPU.
    numbers = torch.tensor(mine, device="cpu" if _sends_from_cpu(group) else "cuda")
    found = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, numbers, group=group)
    gathered: list[list[int]] = torch.stack(found, dim=1).tolist()
    return gathered


def _sends_from_cpu(group: "dist.ProcessGroup") -> bool:
    return "cpu:" in dist.get_backend_config(group)


def _exchange(
    samples: list[Tensor], sizes: list[int], group: "dist.ProcessGroup"
) -> tuple[Tensor, ...]:
    """Return a slice `(B, f)` of each tensor `(b, F)`; all have one dtype and travel together."""
    # For each rank a piece of each tensor, and how wide these pieces are.
    pieces = list(zip(*(x.tensor_split(len(sizes), dim=1) for x in samples), strict=True))
    widths = [[piece.shape[1] for piece in of_rank] for of_rank in pieces]
    # All that one rank is sent has to lie together. A single tensor does so without a copy.
    rows = samples[0]
    if len(samples) > 1:
        rows = torch.cat([piece for of_rank in pieces for piece in of_rank], dim=1)
    columns: Tensor = _Exchange.apply(rows, [sum(of_rank) for of_rank in widths], sizes, group)
    return torch.split(columns, widths[dist.get_rank(group)], dim=1)


class _Exchange(torch.autograd.Function):
    """Gives all features of own samples `(b, F)` away for some features of all samples `(B, f)`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, widths: list[int], sizes: list[int], group: "dist.ProcessGroup"
    ) -> Tensor:
        # The group is held weakly, since a process that still holds one when it ends may abort.
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
        parts = zip(torch.split(received, from_each), ctx.widths, strict=True)
        pieces = [piece.view(size, own) for piece, own in parts]
        return torch.cat(pieces, dim=1), None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grams: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.world = dist.get_world_size(group)
        i, j = torch.triu_indices(*grams.shape[-2:], device=grams.device)
        upper_triangle = grams[..., i, j].contiguous()
        dist.all_reduce(upper_triangle, group=group)
        total = torch.empty_like(grams)
        total[..., i, j] = upper_triangle
        total[..., j, i] = upper_triangle
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # All ranks have the same loss and the same gradient, so this is the sum over all of them.
        return grad * ctx.world, None


class _AveragedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: "dist.ProcessGroup", *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = ref(group)
        ctx.set_materialize_grads(False)  # so that an unused parameter keeps the gradient None
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
