"""With the Trainer of transformers: `python examples/trainers/hf_trainer.py`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from common import Scenes, distilled_sam, losses, parse


class WithLoss(nn.Module):
    """What the Trainer trains, with the loss of segmentation and, in training, of distillation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = distilled_sam(name)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        segmentation, distillation = losses(self.model, {**inputs, "labels": labels})
        return {"loss": segmentation if distillation is None else segmentation + distillation}


if __name__ == "__main__":
    options = parse(__doc__)
    arguments = TrainingArguments(
        "hf_trainer_run",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=True,
        learning_rate=2e-4,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    Trainer(WithLoss(options.model), arguments, None, Scenes(0, 64), Scenes(64, 8)).train()
