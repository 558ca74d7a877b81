"""With Accelerate: `accelerate launch examples/trainers/accelerate_loop.py`.

On several processes, `--batch-size` is that of each, and the loss is that of all of their samples.
"""

from __future__ import annotations

import torch.distributed as dist
from accelerate import Accelerator

from common import distilled_sam, loader, losses, optimizer_of, parse, report


def main() -> None:
    """Train for some steps."""
    options = parse(__doc__)
    accelerator = Accelerator()
    model = distilled_sam(options.model)
    if accelerator.num_processes > 1:
        model.distiller.process_group = dist.group.WORLD
    model, optimizer, batches = accelerator.prepare(
        model, optimizer_of(model), loader(options.batch_size)
    )
    model.train()
    for step, batch in zip(range(options.steps), batches, strict=False):
        segmentation, distillation = losses(model, batch)
        accelerator.backward(segmentation + distillation)
        optimizer.step()
        optimizer.zero_grad()
        segmentation = accelerator.reduce(segmentation.detach(), "mean")
        if accelerator.is_main_process:
            report(step, segmentation, distillation)


if __name__ == "__main__":
    main()
