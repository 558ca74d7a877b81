"""Check data without training.

Every image and mask is opened, as before training: `python examples/finetuning/check_data.py --data
data/mine`. Of one of the paper's data sets, the images of the splits are counted, too:
`python examples/finetuning/check_data.py data/isic2017 isic`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from parts.errors import plain_errors
from parts.options import add_data, next_command, place, require_data


class Recipe(NamedTuple):
    """How many images a data set should have, according to the paper's Appendix C."""

    training: int  # those for validation included
    test: int
    test_table: str = "test.csv"


RECIPES = {
    "cod10k": Recipe(4040, 2026, "test_COD10K.csv"),
    "camo": Recipe(4040, 250, "test_CAMO.csv"),
    "chameleon": Recipe(4040, 76, "test_CHAMELEON.csv"),
    "kvasir": Recipe(1450, 100, "test_Kvasir.csv"),
    "cvc-612": Recipe(1450, 62, "test_CVC-ClinicDB.csv"),
    "isic": Recipe(2150, 600),
    "leaf": Recipe(498, 90),
    "roads": Recipe(1120, 48),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print what there is, or everything that is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=place, nargs="?", help="one of the paper's data sets")
    parser.add_argument("recipe", choices=RECIPES, nargs="?", help="its name")
    add_data(parser.add_argument_group("other data, and how files are read"))
    arguments = parser.parse_args(argv)
    if arguments.folder is None:
        require_data(parser, arguments)
    elif arguments.recipe is None:
        parser.error(f"give a name after {arguments.folder}, or --data before it")
    elif {arguments.data, arguments.images, arguments.masks, arguments.coco} != {None}:
        parser.error("give either a folder and a name, or --data, or --images and --masks")
    with plain_errors():
        from parts.data.check import read_data

        if arguments.recipe is None:
            read_data(arguments)
        else:
            compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print that a folder is one of the paper's data sets, or everything that is wrong with it."""
    from parts.data.check import check
    from parts.data.reading import reading_of
    from parts.data.tables import DataError, Problem, read_tables

    recipe = RECIPES[arguments.recipe]
    splits = read_tables(arguments.folder, recipe.test_table)
    found = len(splits["train"]) + len(splits["val"]), len(splits["test"])
    names = "training and validation", recipe.test_table
    problems = [
        Problem("images", f"{name}: {count} images, not {expected}")
        for name, count, expected in zip(names, found, recipe, strict=False)
        if count != expected
    ]
    try:
        report = check(splits, reading_of(arguments))
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)
    print(*report.lines, f"{arguments.folder} is {arguments.recipe}", sep="\n")
    options = ["--data", arguments.folder, "--test-table", recipe.test_table]
    print(next_command("finetune_sam.py", *options, "..."))


if __name__ == "__main__":
    main()
