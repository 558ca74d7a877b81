"""Fine-tune a model of segment_anything with InfoSAM."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from math import ceil

import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from parts import checkpoint
from parts.adaptation import adapt
from parts.cache import teacher_encoder
from parts.data import loaders
from parts.evaluation import evaluate
from parts.logbook import Logbook
from parts.loss import structure_loss
from parts.options import (
    accelerate,
    from_main_process,
    open_run,
    parse,
    plain_errors,
    read_splits,
)
from parts.prompts import draw_prompts
from parts.sam import MODELS, build
from parts.segmenter import check_teacher
from renyi_kd import FeatureCollector, InfoSAMDistiller


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save a checkpoint after each epoch, and test the one that is best in validation."""
    options = parse(__doc__, argv, "sam", MODELS)
    with plain_errors():
        accelerator = accelerate(options)
        set_seed(options.seed)
        splits = from_main_process(read_splits, options)
        student = build(options.model, options.checkpoint)
        if options.teacher is None:
            teacher = copy.deepcopy(student)  # before the student is adapted
        else:
            teacher = build(options.teacher, options.teacher_checkpoint)
            check_teacher(teacher, student)
        teacher.eval().requires_grad_(False).to(accelerator.device)
        print(adapt(student, options.method, rank=options.rank, targets=options.targets))
        distiller = InfoSAMDistiller(
            student.dim,
            alpha=options.alpha,
            compression_weight=options.compression_weight,
            distillation_weight=options.distillation_weight,
            process_group=torch.distributed.group.WORLD,  # None on one process
        ).to(accelerator.device)
        with accelerator.main_process_first():
            encode = teacher_encoder(teacher, splits["train"], options)
        last = from_main_process(open_run, options)

    modules = {"student": student, "distiller": distiller}
    weights = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=options.lr)
    order = torch.Generator()
    train, val, test = loaders(splits, student.frame, options.batch_size, options.workers, order)
    steps = options.epochs * ceil(len(train) // options.processes / options.accumulate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, options.lr / 10)
    # The distiller is not among them, as it averages its gradients over the processes by itself.
    # `trained` may be a wrapper around the student; what is evaluated and saved is the student.
    trained, optimizer, train, val, test = accelerator.prepare(student, optimizer, train, val, test)

    others = {"optimizer": optimizer, "schedule": schedule}
    if accelerator.scaler is not None:
        others["scaler"] = accelerator.scaler
    done, best = 0, {"epoch": 0, "iou": -1.0}
    if last is not None:
        done, best = checkpoint.resume(last, modules, others)
        print(f"resumed after epoch {done}")
    log = Logbook(options, step=done * len(train), silent=not accelerator.is_main_process)

    for epoch in range(done + 1, options.epochs + 1):
        # The seed of an epoch depends on nothing but its number and the seed of the run. A run that
        # is resumed therefore draws the same random numbers as one that was never stopped.
        set_seed(1000 * options.seed + epoch, device_specific=True)
        order.manual_seed(1000 * options.seed + epoch)
        trained.train()
        started = time.perf_counter()
        with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
            for batch in (bar := tqdm(train, f"epoch {epoch}", disable=log.silent)):
                with accelerator.accumulate(trained):
                    prompts = draw_prompts(options.prompts, options.points, batch)
                    with accelerator.autocast():
                        logits = trained(batch.images, prompts)
                        structure = structure_loss(
                            logits, batch.masks, batch.valid, legacy=options.legacy_loss
                        )
                        loss, terms, features = structure, None, from_student.pop()
                        if not options.no_infosam:
                            with torch.no_grad():
                                embedding = encode(batch)
                                teacher.decode([embedding], prompts)
                            terms = distiller.terms(from_teacher.pop(embedding), features)
                            loss = structure + terms.loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        schedule.step()
                log.training(bar, structure, terms, schedule.get_last_lr()[0])
        seconds = (time.perf_counter() - started) / len(train)

        scores = evaluate(student, val, options.eval_prompts, options.eval_points)
        log.validation(epoch, scores, seconds)
        if scores["iou"] > best["iou"]:
            best = {"epoch": epoch, **scores}
        if accelerator.is_main_process:
            checkpoint.save(options.output, epoch, best, modules, others)
        accelerator.wait_for_everyone()

    checkpoint.load_weights(checkpoint.epoch_folder(options.output, best["epoch"]), modules)
    log.result(best, evaluate(student, test, options.eval_prompts, options.eval_points))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
