"""Write a fine-tuned model as a checkpoint that its package loads.

That is a file for segment_anything and sam2: `python examples/finetuning/export.py runs/leaf
leaf.pth`. For transformers it is a folder, with the JSON files that were in the folder of
`--model`, which are those of the processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from parts.errors import plain_errors
from parts.options import add_moved, place, whole

LOADING = {
    "sam": "sam_model_registry[{!r}](checkpoint={!r})",
    "sam2": "build_sam2(config_of_{}, {!r}, apply_postprocessing=False)",
    "huggingface": "from_pretrained({1!r})",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Export the epoch with the best validation IoU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=place, help="the --output of a fine-tuning script")
    parser.add_argument("path", type=place, help="where to write")
    parser.add_argument("--epoch", type=whole(0), help="another epoch than the best")
    add_moved(parser, data=False)
    arguments = parser.parse_args(argv)
    with plain_errors():
        from parts.files import refuse_existing
        from parts.models.adaptation import NOT_MERGED
        from parts.runs.trained import export, load_run

        refuse_existing([arguments.path])
        student, options = load_run(arguments.run, arguments.epoch, arguments)
        export(student, options, arguments.path)
    print(f"{options.model} with {options.method}: {arguments.path}")
    if options.method in NOT_MERGED:
        call = f'load_adapters(model, Path("{arguments.path}"), method="{options.method}")'
        print(f"It has layers of its own: load it with {call} of parts/runs/trained.py.")
    elif options.model not in ("small", "tiny"):
        print(f"Next: {LOADING[options.package].format(options.model, arguments.path)}")
    print("Its single mask was trained: call the predictor with multimask_output=False.")


if __name__ == "__main__":
    main()
