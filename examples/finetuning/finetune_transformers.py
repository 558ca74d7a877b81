"""Fine-tune a SAM, HQ-SAM, SAM2, EdgeTAM or the tracker of SAM3 of transformers with InfoSAM."""

from __future__ import annotations

from collections.abc import Sequence

from parts.errors import plain_errors
from parts.options import parse_training


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save a checkpoint after each epoch, and test the one that is best in validation."""
    options = parse_training(__doc__, argv, package="huggingface")
    with plain_errors():
        from parts.models.huggingface import downloaded
        from parts.training.loop import train

        # A run remembers the folder, so that it is the same model whatever the Hub has later.
        options.model = downloaded(options.model, "--model")
        if options.teacher is not None:
            options.teacher = downloaded(options.teacher, "--teacher")
        train(options)


if __name__ == "__main__":
    main()
