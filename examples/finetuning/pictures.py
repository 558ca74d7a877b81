"""Draw what runs have learnt, as figures for a paper.

`python examples/finetuning/pictures.py runs/leaf-0 runs/plain-0 --output pictures` writes, each as
PNG, PDF and SVG:

- `predictions`: images with their prompts, the truth, and the masks of the model before training
  and of the runs. The images are the best, the median and the worst one by the IoU of the first
  run, or by what it gains over the second one (`--by difference`), or the `--rows` of the test
  table.
- `relations`: relation maps of teacher and student over the same images, for each run that has a
  relation module. `epochs` has the first of these images over the epochs of the first such run, and
  `histograms` the values of all of its maps.
- `curves`: losses, information in bits, and validation scores, each on axes of its own.

`--labels InfoSAM InfoSAM plain plain` names the runs. Those with one label are seeds of one system:
a curve is their mean, with a band of one standard error to each side. Of these, pictures show the
first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.errors import plain_errors
from parts.options import FORMATS, add_moved, whole


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="--output of a fine-tuning script")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the figures")
    parser.add_argument("--labels", nargs="+", help="a name for each run, the same for seeds")
    parser.add_argument("--rows", type=whole(0), nargs="+", help="rows of the test table, from 0")
    parser.add_argument(
        "--by",
        choices=("iou", "difference"),
        default="iou",
        help="what ranks the images: the IoU of the first run, or what it is above the second's",
    )
    parser.add_argument(
        "--each", type=whole(1), default=1, help="best, median and worst images to draw, of each"
    )
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=FORMATS)
    add_moved(parser, data=True)
    arguments = parser.parse_args(argv)
    if arguments.labels is not None and len(arguments.labels) != len(arguments.runs):
        parser.error(
            f"--labels must name each of the {len(arguments.runs)} runs, "
            f"got {len(arguments.labels)} names"
        )
    with plain_errors():
        from parts.evaluation.drawing import draw

        draw(arguments)


if __name__ == "__main__":
    main()
