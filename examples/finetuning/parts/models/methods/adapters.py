"""Adapters: bottlenecks behind or beside the layers of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from parts.errors import InputError
from parts.models.segmenter import second_norm


class Adapter(nn.Module):
    """A bottleneck, Eq. 26-29 of the paper; the hooks below add its output to something.

    The up-projection starts at zero, so that the student starts as the teacher. In the released
    code of InfoSAM, and in that of SU-SAM, it starts at random.

    Args:
        dim: Channels of input and output.
        width: Channels of the bottleneck.
        scale: A factor of the output.
        activation: What is between the two projections.
        dropout: Share of the bottleneck's channels that are zero in training.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        scale: float = 1.0,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale, self.activation, self.dropout = scale, activation, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return scale * Up(activation(Down(x))), shape (..., dim)."""
        narrow = F.dropout(self.activation(self.down(x)), self.dropout, self.training)
        return self.scale * self.up(narrow)


# A hook finds the adapter through the layer that it is called with. A hook that held the adapter
# itself would, in a copy of the model, still use that of the original.


def behind(layer: nn.Module, _: tuple, __: dict, output: object) -> object:
    """Add to a layer's output what its own `adapter` makes of that output; a forward hook."""
    return plus(output, layer.adapter(output[0] if isinstance(output, tuple) else output))


def beside(layer: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
    """Add to a layer's output what its own `adapter` makes of the input; a forward hook."""
    x, *_ = (*args, *kwargs.values())
    return plus(output, layer.adapter(x))


def plus(output: Tensor | tuple[Tensor, ...], more: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Return a layer's output with something added to it, or to the first of several outputs."""
    if isinstance(output, tuple):
        return output[0] + more, *output[1:]
    return output + more


# The hook and the scale at the attention, and those at the MLP, of each block. With A the output of
# the attention, M that of the MLP, and n1 and n2 what they are given by the two LayerNorms:
PLACES = {
    # A + a(A), M + a(M): the Adapter of the paper.
    "adapter": ((behind, 1.0), (behind, 1.0)),
    # A + a(A), M + a(M) / 2. The released code of SU-SAM lacks the M, without which the weights of
    # the pre-trained MLP would be of no use.
    "su-sam-series": ((behind, 1.0), (behind, 0.5)),
    # A + a(n1) / 2, M + a(n2) / 2, as in the released code of InfoSAM. That of SU-SAM has
    # 1.5 A + a(A) / 2 at the attention, which differs from SAM whatever the adapter is.
    "su-sam-parallel": ((beside, 0.5), (beside, 0.5)),
    # A + a(A), M + a(n2) / 2.
    "su-sam-mixed": ((behind, 1.0), (beside, 0.5)),
}


def add_adapters(encoder: nn.Module, method: str = "adapter") -> int:
    """Put an Adapter at attention and MLP of each transformer block; return how many blocks.

    Args:
        encoder: The image encoder, changed in place.
        method: One of `PLACES`.

    Raises:
        InputError: If an adapter would be beside an attention that changes the shape of its input,
            as some of SAM2 do.
    """
    blocks = transformer_blocks(encoder)
    at_attention, at_mlp = PLACES[method]
    if at_attention[0] is beside and any(changes_shape(block) for block in blocks):
        raise InputError(
            f"--method {method} needs attentions whose output has the shape of their input, as in "
            f"SAM, got a model with others. Take {', '.join(for_any_shape())} or adaptformer."
        )
    for block in blocks:
        put(block.attn, second_norm(block), *at_attention)
        put(block.mlp, second_norm(block), *at_mlp)
    return len(blocks)


def put(layer: nn.Module, norm: nn.LayerNorm, hook: Callable, scale: float) -> None:
    """Give a layer an Adapter for the channels of a LayerNorm, and the hook that uses it."""
    (dim,) = norm.normalized_shape
    layer.adapter = Adapter(dim, dim // 4, scale=scale).to(norm.weight.device)
    layer.register_forward_hook(hook, with_kwargs=True)


def transformer_blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return the blocks of an encoder, which all four families build of the same four layers."""
    return [block for block in encoder.modules() if hasattr(block, "attn")]


def changes_shape(block: nn.Module) -> bool:
    """Return whether a block's attention has more channels, and fewer places, behind it.

    In SAM2 that is so in the first block of each stage but the first.
    """
    return (block.attn.qkv.in_features,) != second_norm(block).normalized_shape


def for_any_shape() -> list[str]:
    """Return the methods that have nothing beside an attention."""
    return [method for method, ((hook, _), _) in PLACES.items() if hook is not beside]


def add_adaptformer(encoder: nn.Module, width: int = 64) -> int:
    """Put AdaptFormer's bottleneck beside LayerNorm and MLP of each block; return how many blocks.

    It is as in the original: its input is not normalised. In the released code of InfoSAM, it has
    the normalised input, GELU, a quarter of the channels as width, and the scale 0.5.

    Args:
        encoder: The image encoder, changed in place.
        width: Channels of the bottleneck.
    """
    blocks = transformer_blocks(encoder)
    for block in blocks:
        norm = second_norm(block)
        (dim,) = norm.normalized_shape
        adapter = Adapter(dim, width, scale=0.1, activation=F.relu, dropout=0.1)
        nn.init.zeros_(adapter.down.bias)
        block.adapter = adapter.to(norm.weight.device)
        norm.register_forward_pre_hook(remember)
        block.register_forward_hook(beside_norm_and_mlp)
    return len(blocks)


def remember(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    """Keep what a LayerNorm is given until the end of its block; a forward pre-hook."""
    norm.given = inputs[0]


def beside_norm_and_mlp(block: nn.Module, _: object, output: object) -> object:
    """Add to a block's output what its own `adapter` makes of the input of LayerNorm and MLP."""
    norm = second_norm(block)
    x = norm.given
    del norm.given  # a tensor with gradients cannot be copied with its module
    return plus(output, block.adapter(x))
