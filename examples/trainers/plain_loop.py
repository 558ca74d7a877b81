"""A loop of one's own: `python examples/trainers/plain_loop.py`."""

from __future__ import annotations

from torch import nn

from common import distilled_sam, loader, losses, optimizer_of, parse, report


def train(model: nn.Module, steps: int, batch_size: int) -> None:
    """Train for some steps."""
    model.train()
    optimizer = optimizer_of(model)
    for step, batch in zip(range(steps), loader(batch_size), strict=False):
        segmentation, distillation = losses(model, batch)
        (segmentation + distillation).backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, segmentation, distillation)


if __name__ == "__main__":
    options = parse(__doc__)
    train(distilled_sam(options.model), options.steps, options.batch_size)
