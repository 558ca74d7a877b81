"""With Lightning: `python examples/trainers/lightning_trainer.py --devices 2`.

`--batch-size` is that of each device, and the loss is that of the samples of all devices.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from torch import Tensor

from common import distilled_sam, loader, losses, optimizer_of, parse, report


class Lit(LightningModule):
    """A SAM, its teacher and the loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = distilled_sam(name)

    def setup(self, stage: str) -> None:
        """Compare the samples of all devices."""
        if self.trainer.world_size > 1:
            self.model.distiller.process_group = dist.group.WORLD

    def training_step(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return the loss."""
        segmentation, distillation = losses(self.model, batch)
        mean = self.trainer.strategy.reduce(segmentation.detach())
        if self.trainer.is_global_zero:
            report(step, mean, distillation)
        return segmentation + distillation

    def validation_step(self, batch: dict[str, Tensor], step: int) -> None:
        """Log the loss of segmentation."""
        self.log("validation", losses(self.model, batch)[0], sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for what trains."""
        return optimizer_of(self.model)


if __name__ == "__main__":
    options = parse(__doc__, devices=1)
    trainer = Trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Lit(options.model), loader(options.batch_size), loader(options.batch_size, first=64)
    )
