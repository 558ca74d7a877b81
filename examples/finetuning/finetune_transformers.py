"""Fine-tune a SAM or SAM2 of transformers with InfoSAM."""

from __future__ import annotations

from collections.abc import Sequence

from parts.errors import plain_errors
from parts.options import parse_training


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save a checkpoint after each epoch, and test the one that is best in validation."""
    options = parse_training(__doc__, argv, package="huggingface")
    with plain_errors():
        from parts.training.loop import train

        train(options)


if __name__ == "__main__":
    main()
