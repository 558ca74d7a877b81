"""With `torch.compile`, of the whole model: `python examples/trainers/compiled.py`."""

from __future__ import annotations

import torch

from common import distilled_sam, parse
from plain_loop import train

if __name__ == "__main__":
    options = parse(__doc__)
    train(torch.compile(distilled_sam(options.model)), options.steps, options.batch_size)
