"""Write a fine-tuned model as a checkpoint that its package loads.

That is a file for segment_anything and sam2, and a folder for transformers:
`python examples/finetuning/export.py runs/leaf leaf.pth`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.options import plain_errors
from parts.trained import export, load_run


def main(argv: Sequence[str] | None = None) -> None:
    """Export the epoch with the best validation IoU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --output of a fine-tuning script")
    parser.add_argument("path", type=Path, help="where to write")
    parser.add_argument("--epoch", type=int, help="another epoch than the best")
    arguments = parser.parse_args(argv)
    with plain_errors():
        if arguments.path.exists():
            raise ValueError(f"{arguments.path} exists")
        student, options = load_run(arguments.run, arguments.epoch)
        export(student, options, arguments.path)
    print(f"{options.model} with {options.method}: {arguments.path}")
    print("Its single mask was trained: call the predictor with multimask_output=False.")
    if options.method == "adapter":
        print("It has adapters: load it with load_adapters(model, path) of parts/trained.py.")


if __name__ == "__main__":
    main()
