"""Training on one process or on several: what the first one does for all, and how they agree."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from parts.errors import InputError, describe

T = TypeVar("T")


def accelerate(options: argparse.Namespace) -> Accelerator:
    """Return the accelerator that was asked for, and silence all processes but the main one.

    Raises:
        InputError: If the device lacks the precision, or if a step sees a single image.
    """
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.cpu,
        # Even batches would repeat images, so that all processes get as many, and an evaluation
        # would count those twice. In training the last batches are left out if they are too few for
        # all processes.
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    options.processes = accelerator.num_processes
    batch = options.batch_size * options.processes
    if options.precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU, on a CPU use bf16")
    if options.distiller != "infosam":
        return accelerator
    if batch < 2:
        raise InputError(
            "--batch-size must be at least 2 on one process: InfoSAM compares the samples"
        )
    if options.accumulate > 1:
        print(
            f"Gradients of {options.accumulate} batches are added up; the Gram matrices stay "
            f"{batch} x {batch}, those of one batch."
        )
    return accelerator


def from_main_process(
    function: Callable[[argparse.Namespace], T], options: argparse.Namespace
) -> T:
    """Call a function on the main process; return its value, or raise its error, on all of them."""
    error, outcome = None, [None, ""]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(options)
        except InputError as raised:
            error, outcome[1] = raised, str(raised)
        except OSError as raised:
            error, outcome[1] = raised, describe(raised)
    broadcast_object_list(outcome)
    result, message = outcome
    if message:
        raise error or InputError(message)
    return result


def raise_if_any(problem: str | None) -> None:
    """Raise `InputError` on all processes if one of them has a problem."""
    found = [text for text in gather_object([problem]) if text is not None]
    if found:
        raise InputError(found[0])
