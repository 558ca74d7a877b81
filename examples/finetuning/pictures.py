"""Draw what runs have learnt.

`python examples/finetuning/pictures.py runs/leaf-0 runs/leaf-plain --output pictures` writes three
files:

- `predictions.png` shows images with their prompts, the truth, and the masks of the model before
  training and of every run. The images are those on which the first run does worst and best, or
  the `--rows` of the test table.
- `relations.png` shows the relation maps of the first run's teacher and student over its epochs,
  and how their values are distributed.
- `curves.png` shows losses, information in bits, and validation scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.errors import plain_errors
from parts.options import add_moved, whole


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the three pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="--output of a fine-tuning script")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the pictures")
    parser.add_argument("--rows", type=whole(0), nargs="+", help="rows of the test table, from 0")
    parser.add_argument(
        "--extremes", type=whole(1), default=2, help="worst and best images to draw"
    )
    add_moved(parser, data=True)
    arguments = parser.parse_args(argv)
    with plain_errors():
        from parts.evaluation.drawing import draw

        draw(arguments)


if __name__ == "__main__":
    main()
