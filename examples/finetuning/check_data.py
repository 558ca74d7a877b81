"""Check a folder against one of the paper's data sets.

Every image and mask is opened, as before training, and the images of the splits are counted:
`python examples/finetuning/check_data.py data/isic2017 isic`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parts.data import DataError, check, read_tables
from parts.options import plain_errors


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
    """Print how many images there are, or everything that is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe", choices=RECIPES)
    arguments = parser.parse_args(argv)
    recipe = RECIPES[arguments.recipe]
    with plain_errors():
        splits = read_tables(arguments.folder, recipe.test_table)
        found = len(splits["train"]) + len(splits["val"]), len(splits["test"])
        problems = [
            f"{split}: {count} images, not {expected}"
            for split, count, expected in zip(
                ("training and validation", recipe.test_table), found, recipe, strict=False
            )
            if count != expected
        ]
        try:
            check(splits)
        except DataError as error:
            problems += error.problems
        if problems:
            raise DataError(problems)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{arguments.folder} is {arguments.recipe}: {counts}")


if __name__ == "__main__":
    main()
