"""Fine-tune a model of segment_anything with InfoSAM."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from math import ceil

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from finetuning import checkpoint
from finetuning.adaptation import adapt
from finetuning.data import loaders
from finetuning.evaluation import evaluate
from finetuning.logbook import Logbook
from finetuning.loss import structure_loss
from finetuning.options import open_run, parse, plain_errors, read_splits
from finetuning.prompts import draw_prompts
from finetuning.sam import MODELS, build
from renyi_kd import FeatureCollector, InfoSAMDistiller


def main(argv: Sequence[str] | None = None) -> None:
    """Train, keep a checkpoint an epoch, and test the one that is best on validation data."""
    options = parse(__doc__, argv, MODELS)
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.cpu,
    )
    set_seed(options.seed)
    with plain_errors():
        splits = read_splits(options)
        student = build(options.model, options.checkpoint)
        if options.teacher is None:
            teacher = copy.deepcopy(student)  # before the student is adapted
        else:
            teacher = build(options.teacher, options.teacher_checkpoint)
        teacher.eval().requires_grad_(False).to(accelerator.device)
        print(adapt(student, options.method, rank=options.rank, targets=options.targets))
        distiller = InfoSAMDistiller(
            student.dim,
            alpha=options.alpha,
            compression_weight=options.compression_weight,
            distillation_weight=options.distillation_weight,
        )
        last = open_run(options)

    modules = {"student": student, "distiller": distiller}
    weights = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=options.lr)
    order = torch.Generator()
    train, val, test = loaders(splits, student.frame, options.batch_size, options.workers, order)
    steps = options.epochs * ceil(len(train) / options.accumulate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, options.lr / 10)
    student, distiller, optimizer, train, val, test = accelerator.prepare(
        student, distiller, optimizer, train, val, test
    )

    done, best = 0, {"epoch": 0, "iou": -1.0}
    if last is not None:
        checkpoint.load_weights(last, modules)
        state = checkpoint.load_state(last)
        done, best = state["epoch"], state["best"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        print(f"resumed after epoch {done}")
    log = Logbook(options, step=done * len(train))

    for epoch in range(done + 1, options.epochs + 1):
        # All that is random starts anew from seed and epoch, so there is no state to save.
        set_seed(1000 * options.seed + epoch)
        order.manual_seed(1000 * options.seed + epoch)
        student.train()
        started = time.perf_counter()
        with FeatureCollector(teacher) as of_teacher, FeatureCollector(student) as of_student:
            for batch in (bar := tqdm(train, f"epoch {epoch}")):
                with accelerator.accumulate(student, distiller):
                    prompts = draw_prompts(options.prompts, options.points, batch)
                    with accelerator.autocast():
                        logits = student(batch.images, prompts)
                        structure = structure_loss(
                            logits, batch.masks, batch.valid, legacy=options.legacy_loss
                        )
                        loss, terms, features = structure, None, of_student.pop()
                        if not options.no_infosam:
                            with torch.no_grad():
                                teacher(batch.images, prompts)
                            terms = distiller.terms(of_teacher.pop(), features)
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
        state = {
            "epoch": epoch,
            "best": best,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        checkpoint.save(options.output, epoch, modules, state)

    checkpoint.load_weights(checkpoint.of_epoch(options.output, best["epoch"]), modules)
    log.result(best, evaluate(student, test, options.eval_prompts, options.eval_points))


if __name__ == "__main__":
    main()
