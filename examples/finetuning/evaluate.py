"""Compare fine-tuned models.

`python examples/finetuning/evaluate.py runs/leaf-0 runs/leaf-1 --pretrained --output scores` prints
a table with a row for each run, and below it the mean and the standard deviation over runs that
differ in nothing but their seed. With `--output`, it writes the same to `scores.json` in a new
folder, and to `images.csv` a line for each run and row of the test table.

`--on data/source --prompts points --points 1` evaluates the runs on other data than their own, such
as some of what the pre-trained model could do before. `--average 0.5` adds each run with weights
that are half its own and half those from before training (WiSE-FT, Wortsman et al., CVPR 2022).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.errors import plain_errors
from parts.options import MOST_POINTS, SPLITS, add_moved, check_shares, number, place, whole


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate every run on its own data and with its own kind of prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="--output of a fine-tuning script")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--test-table", help="another table than that of the run")
    parser.add_argument("--pretrained", action="store_true", help="also the models before training")
    parser.add_argument(
        "--average",
        type=number(0),
        nargs="+",
        default=[],
        metavar="SHARE",
        help="also the runs mixed with what they started from, with this share of their own",
    )
    parser.add_argument("--on", type=place, metavar="FOLDER", help="other data, with three tables")
    parser.add_argument("--prompts", choices=("boxes", "points"), help="other prompts than the run")
    parser.add_argument("--points", type=whole(1, MOST_POINTS), help="points of such a prompt")
    parser.add_argument("--paper", action="store_true", help="the metrics of the released program")
    parser.add_argument("--output", type=Path, help="a new folder for the scores")
    add_moved(parser, data=True)
    arguments = parser.parse_args(argv)
    check_shares(parser, arguments.average)
    if arguments.points is not None and arguments.prompts != "points":
        parser.error("--points needs --prompts points")
    moved = {getattr(arguments, f"moved_{name}") for name in ("data", "images", "masks", "coco")}
    if arguments.on is not None and moved != {None}:
        parser.error(
            "--on takes other data, so that --data, --images, --masks and --coco have no use"
        )
    with plain_errors():
        from parts.evaluation.comparison import compare

        compare(arguments)


if __name__ == "__main__":
    main()
