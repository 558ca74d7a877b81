"""Segment images with a fine-tuned model.

`python examples/finetuning/predict.py runs/leaf prompts.csv --output masks` reads prompts from a
table. Its columns are `image` and either `x0,y0,x1,y1`, which is a box, or `x,y,label`, which is a
point on the object (label 1) or beside it (label 0). All numbers are pixels of the image. Each box
gives a mask of its own, and all points of an image give one mask together.

`python examples/finetuning/predict.py runs/leaf images --box 10 10 200 150 --output masks` asks for
the same box in every image of a folder.

Masks are PNG files of 0 and 255, in the size of the image. The folder of masks appears when all of
them are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.errors import plain_errors
from parts.options import add_image_range, add_moved, number, place, whole


def main(argv: Sequence[str] | None = None) -> None:
    """Read the prompts, segment, write the masks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the --output of a fine-tuning script")
    parser.add_argument("prompts", type=place, help="a table, or with --box a folder of images")
    parser.add_argument(
        "--box",
        type=number(),
        nargs=4,
        metavar=("X0", "Y0", "X1", "Y1"),
        help="the box in every image of the folder",
    )
    parser.add_argument("--images", type=place, help="folder of the images, by default the table's")
    parser.add_argument("--output", type=place, required=True, help="a new folder for the masks")
    parser.add_argument(
        "--overlays", type=place, help="a new folder for the images with their masks and prompts"
    )
    parser.add_argument("--epoch", type=whole(0), help="another epoch than the best")
    add_image_range(parser)
    add_moved(parser, data=False)
    arguments = parser.parse_args(argv)
    with plain_errors():
        from parts.evaluation.prediction import predict

        predict(arguments)


if __name__ == "__main__":
    main()
