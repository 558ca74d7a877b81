"""Write a generated data set in the layout in which the paper's circulate.

`python examples/quickstart/make_dataset.py data/toy`
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scenes import make_scenes


def main(argv: Sequence[str] | None = None) -> None:
    """Write images, masks and the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=96, help="images in train.csv")
    parser.add_argument("--val", type=int, default=32, help="images in val.csv")
    parser.add_argument("--test", type=int, default=32, help="images in test.csv")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    for place, split in enumerate(("train", "val", "test")):
        scenes = make_scenes("target", getattr(args, split), seed=3 * args.seed + place)
        (args.folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (image, mask) in enumerate(zip(scenes.image, scenes.mask, strict=True)):
            names = f"{split}/{i:04d}.jpg", f"{split}/{i:04d}_mask.png"
            Image.fromarray(image).save(args.folder / names[0], quality=95)
            Image.fromarray(mask).save(args.folder / names[1])
            rows.append([i, *names])
        with (args.folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["", "image", "label"], *rows])


if __name__ == "__main__":
    main()
