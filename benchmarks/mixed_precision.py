"""Distilling in mixed precision: `python benchmarks/mixed_precision.py`.

Fine-tunes the small SAM for some steps in float32, bfloat16 and float16, the last with a
`GradScaler` as PyTorch documents it, with and without the distiller. Prints whether the losses
stayed finite, where the scale settled, how many steps were skipped, and the memory at the peak.
"""

from __future__ import annotations

import argparse

import torch

from renyi_kd import FeatureCollector
from step import make_setting, structure_loss


def main() -> None:
    """Print one line for each precision, with and without the distiller."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{options.steps} steps of {options.model}, batch {options.batch_size}, {device.type}\n")
    print("| precision | distiller | finite losses | first, last loss | scale | skipped | MB |")
    print("|---|---|---|---|---|---|---|")
    for precision in options.precisions:
        for distils in (False, True):
            cells = run(precision, distils, options, device)
            print(
                f"| {precision} | {'yes' if distils else 'no'} | {' | '.join(cells)} |", flush=True
            )


def run(
    precision: str, distils: bool, options: argparse.Namespace, device: torch.device
) -> list[str]:
    """Fine-tune, and return what the columns say."""
    student, teacher, distiller, optimizer, images, prompts, masks = make_setting(
        "sam", options.model, options.batch_size, device
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    autocast = torch.autocast(
        device.type, getattr(torch, precision), enabled=precision != "float32"
    )
    losses, skipped = [], 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
        for _ in range(options.steps):
            with autocast:
                loss = structure_loss(student(images, prompts), masks)
                features = from_student.pop()
                if distils:
                    with torch.no_grad():
                        teacher(images, prompts)
                    loss = loss + distiller(from_teacher.pop(), features)
            losses.append(loss.detach())
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale
            optimizer.zero_grad()
    all_losses = torch.stack(losses)
    memory = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan")
    return [
        f"{int(all_losses.isfinite().sum())} of {len(losses)}",
        f"{losses[0]:.3f}, {losses[-1]:.3f}",
        f"{scaler.get_scale():g}",
        str(skipped),
        f"{memory:.0f}",
    ]


if __name__ == "__main__":
    main()
