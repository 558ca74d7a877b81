"""The training loop, the same for every package."""

from __future__ import annotations

import argparse
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parts.data.batches import Batch, loaders
from parts.data.check import Report, read_data
from parts.data.prompts import draw_prompts
from parts.data.reading import reading_of
from parts.data.tables import Splits
from parts.distillers.base import Distiller
from parts.distillers.choice import build_distiller, compared_layers
from parts.distillers.collecting import Collector
from parts.distillers.infosam import InfoSAM
from parts.errors import InputError
from parts.evaluation.scores import evaluate
from parts.models.adaptation import adapt
from parts.models.methods.convlora import load_loss
from parts.models.methods.hqsam import load_hq
from parts.models.segmenter import Segmenter
from parts.options import next_command
from parts.runs import checkpoint
from parts.runs.folder import check_output, digest_of_data, record, running
from parts.runs.trained import teacher_and_student
from parts.training.cache import teacher_encoder
from parts.training.logbook import Logbook, check_tables, check_trackers
from parts.training.loss import structure_loss
from parts.training.point_loss import point_loss
from parts.training.processes import accelerate, from_main_process


def train(options: argparse.Namespace) -> None:
    """Train, save a checkpoint after each epoch, and test the one that is best in validation.

    Raises:
        InputError: If anything that was given is wrong, or if a loss or a weight is not finite. If
            there is no checkpoint yet, everything that was written is removed.
    """
    accelerator = accelerate(options)
    check_trackers(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    from_main_process(check_output, options)
    splits, report = from_main_process(read_data, options)
    options.digests = digest_of_data(report)
    if len(splits["train"]) < options.batch_size * options.processes:
        raise InputError(
            f"--batch-size must be at most the number of training images, {len(splits['train'])}, "
            f"over that of processes, {options.processes}, got {options.batch_size}"
        )
    teacher, student = teacher_and_student(options)
    print(adapt(student, options.method, rank=options.rank, targets=options.targets))
    if options.hq_checkpoint is not None:
        load_hq(student, options.hq_checkpoint)
    distiller = build_distiller(options, teacher, student)
    with ExitStack() as stack:
        last = from_main_process(lambda asked: stack.enter_context(running(asked)), options)
        fit(accelerator, splits, report, teacher, student, distiller, last, options)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    print(f"{options.output} holds the run. {next_command('evaluate.py', options.output)}")


def fit(
    accelerator: Accelerator,
    splits: Splits,
    report: Report,
    teacher: Segmenter,
    student: Segmenter,
    distiller: Distiller | InfoSAM | None,
    last: Path | None,
    options: argparse.Namespace,
) -> None:
    """Train the student and the distiller, from the beginning or from the last checkpoint."""
    teacher.to(accelerator.device)
    with accelerator.main_process_first():
        images = [image for image, _ in report.digests["train"]]
        encode = teacher_encoder(teacher, images, options)
    teacher_layers, student_layers = compared_layers(options, teacher, student)
    modules: dict[str, nn.Module] = {"student": student}
    if distiller is not None:
        modules["distiller"] = distiller.to(accelerator.device)
    weights = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=options.lr)
    order = torch.Generator()
    train, val, test = loaders(
        splits, student.frame, reading_of(options), options.batch_size, options.workers, order
    )
    epoch_steps = math.ceil(len(train) // options.processes / options.accumulate)

    def cosine(step: int) -> float:
        """Return a factor that falls from 1 to a tenth."""
        return 0.55 + 0.45 * math.cos(math.pi * step / (options.epochs * epoch_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    # `trained` may be a wrapper around the student; what is evaluated and saved is the student.
    trained, optimizer, train, val, test = accelerator.prepare(student, optimizer, train, val, test)
    learned = [p for p in student.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in learned] if options.start_weight else []
    compare = distiller
    if options.processes > 1 and learns(distiller) and not isinstance(distiller, InfoSAM):
        # The distiller of the library averages its gradients over the processes by itself. Others
        # are not prepared by accelerate, which would compute them in half precision.
        compare = DistributedDataParallel(distiller)

    others = {"optimizer": optimizer, "schedule": schedule}
    if accelerator.scaler is not None:
        others["scaler"] = accelerator.scaler
    done, best = 0, {"epoch": 0, "iou": -1.0}
    if last is not None:
        done, best = checkpoint.resume(last, modules, others)
        for group in optimizer.param_groups:  # with more epochs than before, it is not what it was
            group["lr"] = options.lr * cosine(done * epoch_steps)
        print(f"resumed after epoch {done}")
    # Up to here nothing of an earlier run was changed, so that a bad start leaves it as it was.
    from_main_process(check_tables, options)
    from_main_process(record, options)
    log = Logbook(
        options,
        splits["train"],
        len(train),
        step=done * len(train),
        scaled=accelerator.scaler is not None,
        silent=not accelerator.is_main_process,
    )
    for epoch in range(done + 1, options.epochs + 1):
        # The seed of an epoch depends on nothing but its number and the seed of the run. A run that
        # is resumed therefore draws the same random numbers as one that was never stopped. Each
        # process adds its number.
        seed = (1000 * options.seed + epoch) % (2**32 - options.processes)
        set_seed(seed, device_specific=True)
        order.manual_seed(seed)
        if options.augment:
            train.dataset.seed = seed
        trained.train()
        began = time.perf_counter()
        with (
            Collector(teacher, teacher_layers) as from_teacher,
            Collector(student, student_layers) as from_student,
        ):
            for batch in train:
                with accelerator.accumulate(*(m for m in (trained, compare) if m is not None)):
                    prompts = draw_prompts(options.prompts, options.points, batch)
                    with accelerator.autocast():
                        logits = trained(batch.images, prompts)
                        figures = losses_of_masks(options, logits, batch, student)
                        if options.start_weight:
                            apart = zip(learned, start, strict=True)
                            squares = sum((now - then).square().sum() for now, then in apart)
                            figures |= {"start": options.start_weight * squares}
                        loss = sum(figures.values())
                        student_pass = from_student.pop(logits)
                        if distiller is not None:
                            with torch.no_grad():
                                levels = encode(batch)
                                if options.shuffled_teacher:
                                    levels = [level.roll(1, dims=0) for level in levels]
                                teacher_logits = teacher.decode(levels, prompts)
                            teacher_pass = from_teacher.pop(teacher_logits, levels[-1])
                    if distiller is not None:
                        # Outside of autocast, as statistics of a batch need all their digits.
                        distance = compare(teacher_pass, student_pass, batch.masks)
                        loss = loss + options.distiller_weight * distance
                        figures |= {options.distiller: distance}
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        schedule.step()
                if len(figures) > 1:
                    figures["loss"] = loss
                if distiller is not None:
                    figures |= distiller.figures()
                log.training(batch.index, figures, schedule.get_last_lr()[0])
                # Layers and their graph are not to live until the next ones are there.
                logits = figures = loss = distance = student_pass = teacher_pass = None
        seconds = (time.perf_counter() - began) / len(train)

        if epoch % options.validate_every and epoch < options.epochs:
            continue
        finite = checkpoint.trained_weights(epoch, modules)
        scores = evaluate(student, val, options.eval_prompts, options.eval_points)
        log.validation(epoch, scores, seconds)
        if scores["iou"] > best["iou"]:
            best = {"epoch": epoch, **scores}
        if accelerator.is_main_process:
            checkpoint.save(options.output, epoch, best, finite, others)
        accelerator.wait_for_everyone()

    checkpoint.load_weights(checkpoint.epoch_folder(options.output, best["epoch"]), modules)
    log.result(best, evaluate(student, test, options.eval_prompts, options.eval_points))
    log.close()


def losses_of_masks(
    options: argparse.Namespace, logits: Tensor, batch: Batch, student: Segmenter
) -> dict[str, Tensor]:
    """Return the losses that train the student without a teacher, by the names of their columns."""
    if options.point_loss:
        losses = {"points": point_loss(logits, batch.masks, batch.valid)}
    else:
        legacy = options.legacy_loss
        losses = {"structure": structure_loss(logits, batch.masks, batch.valid, legacy=legacy)}
    load = load_loss(student)
    return losses if load is None else losses | {"load": load}


def learns(module: nn.Module | None) -> bool:
    """Return whether there is a module, and anything of it trains."""
    return module is not None and any(p.requires_grad for p in module.parameters())
