"""Write a fine-tuned model as a checkpoint that its package loads.

That is a file for segment_anything and sam2: `python examples/finetuning/export.py runs/leaf
leaf.pth`. For transformers it is a folder, with the JSON files that were in the folder of
`--model`, which are those of the processor.

With `--average 0.75` its weights are three quarters those of the run, and one quarter those from
before training (WiSE-FT, Wortsman et al., CVPR 2022).

With `--adapter` it is a folder that `peft.PeftModel.from_pretrained` adds to the official model:
`python examples/finetuning/export.py runs/leaf leaf-adapter --adapter --push-to me/leaf-adapter`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parts.errors import plain_errors
from parts.options import add_moved, check_shares, number, place, whole

if TYPE_CHECKING:
    from parts.models.segmenter import Segmenter

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
    parser.add_argument(
        "--average",
        type=number(0),
        metavar="SHARE",
        help="mix the run with what it started from, with this share of its own",
    )
    group = parser.add_argument_group("to share it")
    group.add_argument(
        "--adapter", action="store_true", help="write an adapter of PEFT, with a model card"
    )
    group.add_argument(
        "--push-to", metavar="OWNER/NAME", help="where to upload the adapter on the Hub, too"
    )
    group.add_argument(
        "--base-model", metavar="OWNER/NAME", help="what the Hub calls --model, for the model card"
    )
    add_moved(parser, data=False)
    arguments = parser.parse_args(argv)
    if not arguments.adapter and (arguments.push_to or arguments.base_model):
        parser.error("--push-to and --base-model need --adapter")
    if arguments.adapter and arguments.epoch == 0:
        parser.error("--adapter needs an --epoch of training, got 0")
    if arguments.average is not None:
        check_shares(parser, [arguments.average])
    if arguments.adapter and arguments.average is not None:
        parser.error("--average mixes all weights, and --adapter writes few; leave one of them out")
    with plain_errors():
        from parts.files import refuse_existing
        from parts.models.adaptation import NOT_MERGED
        from parts.runs.trained import average, check_merged, export, load_run

        refuse_existing([arguments.path])
        student, options = load_run(arguments.run, arguments.epoch, arguments)
        if arguments.adapter:
            share(student, options, arguments)
            return
        if arguments.average is not None:
            check_merged(arguments.run, options)
            average(student, load_run(arguments.run, 0, arguments)[0], arguments.average)
        export(student, options, arguments.path)
    shares = "" if arguments.average is None else f", a share of {arguments.average:g} of it"
    print(f"{options.model} with {options.method}{shares}: {arguments.path}")
    if options.method in NOT_MERGED:
        call = f'load_adapters(model, Path("{arguments.path}"), method="{options.method}")'
        print(f"It has layers of its own: load it with {call} of parts/runs/trained.py.")
    elif options.model not in ("small", "tiny"):
        print(f"Next: {LOADING[options.package].format(options.model, arguments.path)}")
    print("Its single mask was trained: call the predictor with multimask_output=False.")


def share(student: Segmenter, options: argparse.Namespace, arguments: argparse.Namespace) -> None:
    """Write the student as an adapter of PEFT, and upload it if that is asked for."""
    from parts.runs.adapter import check_asked, push, save_adapter
    from parts.runs.card import model_card, read_scores
    from parts.runs.checkpoint import best_epoch

    check_asked(options, (arguments.push_to, arguments.base_model))
    epoch = best_epoch(arguments.run) if arguments.epoch is None else arguments.epoch
    scores = read_scores(arguments.run, epoch)
    place = arguments.push_to or arguments.path.name
    card = model_card(student, options, scores, place, arguments.base_model)
    save_adapter(student, options, card, arguments.path)
    print(f"{options.model} with {options.method}: {arguments.path}, see README.md there")
    if arguments.push_to is not None:
        print(push(arguments.path, arguments.push_to))


if __name__ == "__main__":
    main()
