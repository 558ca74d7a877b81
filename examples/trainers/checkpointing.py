"""With gradient checkpointing in the image encoder: `python examples/trainers/checkpointing.py`.

The layers of the encoder keep no activations, and run once more in the backward pass. The mask
decoder, whose tokens are collected as it runs, must run once.
"""

from __future__ import annotations

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers.models.sam.modeling_sam import SamVisionLayer

from common import distilled_sam, parse
from plain_loop import train

if __name__ == "__main__":
    options = parse(__doc__)
    model = distilled_sam(options.model)
    apply_activation_checkpointing(
        model.student.vision_encoder, check_fn=lambda module: isinstance(module, SamVisionLayer)
    )
    train(model, options.steps, options.batch_size)
