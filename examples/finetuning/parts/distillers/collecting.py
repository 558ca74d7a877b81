"""What distillers compare is collected by hooks, so that the models stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from parts.distillers.base import Pass
from parts.models.segmenter import Segmenter
from renyi_kd import FeatureCollector


class Collector:
    """Keeps what the passes of a model leave, inside of a `with` block.

    Args:
        model: The model.
        layers: Numbers of the blocks whose outputs are wanted, or none.
    """

    def __init__(self, model: Segmenter, layers: Sequence[int] = ()) -> None:
        self.features = FeatureCollector(model)
        self.blocks = [model.blocks[i] for i in layers]
        self.layers: list[Tensor] = []
        self.stack = ExitStack()

    def __enter__(self) -> Collector:
        """Start to collect."""
        self.stack.enter_context(self.features)
        for block in self.blocks:
            handle = block.register_forward_hook(self.keep)
            self.stack.callback(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and forget what was collected."""
        self.layers.clear()
        self.stack.close()

    def keep(self, block: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        """Keep the output of a block, which has its channels last."""
        maps = output[0] if isinstance(output, tuple) else output
        self.layers.append(maps.movedim(-1, 1))

    def pop(self, logits: Tensor, embedding: Tensor | None = None) -> Pass:
        """Return what the last pass left, and forget it.

        Args:
            logits: The mask logits that the model returned, (B, s, s).
            embedding: Image embeddings from a cache, if the encoder did not run.
        """
        features = self.features.pop(embedding)
        layers, self.layers = self.layers, []
        return Pass(
            [at_least_float32(maps) for maps in layers],
            at_least_float32(features.image_embedding),
            at_least_float32(features.mask_tokens),
            at_least_float32(logits),
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype in which distances keep their digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
