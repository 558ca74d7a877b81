"""Write a generated data set in the layout in which the paper's circulate.

`python examples/quickstart/make_dataset.py data/toy`
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

# What the fine-tuning programs share lies in the next folder.
sys.path.append(str(Path(__file__).parents[1] / "finetuning"))

from parts.errors import plain_errors
from parts.files import appearing
from parts.options import next_command, whole
from scenes import make_scenes


def main(argv: Sequence[str] | None = None) -> None:
    """Write images, masks and the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--train", type=whole(1), default=96, help="images in train.csv")
    parser.add_argument("--val", type=whole(1), default=32, help="images in val.csv")
    parser.add_argument("--test", type=whole(1), default=32, help="images in test.csv")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0)
    args = parser.parse_args(argv)
    with plain_errors(), appearing(args.folder) as folder:
        for place, split in enumerate(("train", "val", "test")):
            scenes = make_scenes("target", getattr(args, split), seed=3 * args.seed + place)
            (folder / split).mkdir(parents=True)
            rows = []
            for i, (image, mask) in enumerate(zip(scenes.image, scenes.mask, strict=True)):
                names = f"{split}/{i:04d}.jpg", f"{split}/{i:04d}_mask.png"
                Image.fromarray(image).save(folder / names[0], quality=95)
                Image.fromarray(mask).save(folder / names[1])
                rows.append([i, *names])
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["", "image", "label"], *rows])
    print(f"{args.train} + {args.val} + {args.test} images: {args.folder}")
    weights = os.path.relpath(Path(__file__).with_name("tiny_sam.safetensors"))
    model = ("--model", "tiny", "--checkpoint", weights)
    print(next_command("finetune_sam.py", *model, "--data", args.folder, "--output", "run"))


if __name__ == "__main__":
    main()
