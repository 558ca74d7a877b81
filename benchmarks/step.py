"""What distilling adds to a fine-tuning step: `python benchmarks/step.py`, with `--model vit_b`.

A step of LoRA and the decoder on random pictures and boxes, with backward and optimiser: without a
teacher, with its embeddings from a cache, and with its encoder. The three take turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

# What is measured is a step of the fine-tuning scripts, made of the same parts.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetuning"))

from parts.data.prompts import Prompts
from parts.models import sam, sam2
from parts.models.adaptation import adapt
from parts.models.segmenter import Segmenter
from parts.training.loss import structure_loss
from renyi_kd import FeatureCollector, InfoSAMDistiller

ROUTES = ("no teacher", "cached teacher", "teacher's encoder")


class Setting(NamedTuple):
    """A student and what it learns from."""

    student: Segmenter
    teacher: Segmenter
    distiller: InfoSAMDistiller
    optimizer: torch.optim.Optimizer
    images: Tensor
    prompts: Prompts
    masks: Tensor


def make_setting(package: str, model: str, batch: int, device: torch.device) -> Setting:
    """Return a model with LoRA beside its unchanged copy, and random pictures."""
    torch.manual_seed(0)
    student = {"sam": sam, "sam2": sam2}[package].build(model, None).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    adapt(student, "lora", targets=["qkv"])
    distiller = InfoSAMDistiller(student.dim).to(device)
    learners = [p for m in (student, distiller) for p in m.parameters() if p.requires_grad]
    size = student.frame.size
    boxes = torch.tensor([[0.2, 0.3, 0.7, 0.8]], device=device).mul(size).repeat(batch, 1)
    masks = torch.zeros(batch, size, size, dtype=torch.bool, device=device)
    masks[:, size // 3 : 3 * size // 4, size // 5 : 2 * size // 3] = True
    images = torch.randn(batch, 3, size, size, device=device)
    optimizer = torch.optim.Adam(learners, lr=2e-4)
    return Setting(student, teacher, distiller, optimizer, images, Prompts(boxes), masks)


def main() -> None:
    """Print the median times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", choices=("sam", "sam2"), default="sam")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher, distiller, optimizer, images, prompts, masks = make_setting(
        options.package, options.model, options.batch_size, device
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)

    with tempfile.NamedTemporaryFile() as file:
        with torch.no_grad(), autocast:
            embedding = teacher.encode(images)[-1].half().cpu().contiguous()
        file.write(embedding.view(torch.uint8).numpy())
        file.flush()
        stored = torch.from_file(file.name, size=embedding.numel(), dtype=torch.float16)

        def step(route: str) -> None:
            if route == "cached teacher":  # a data loader brings it with the images
                teachers = stored.view(embedding.shape).clone().to(device).float()
            with autocast:
                loss = structure_loss(student(images, prompts), masks)
                features = from_student.pop()
                if route != "no teacher":
                    with torch.no_grad():
                        if route == "teacher's encoder":
                            teachers = teacher.encode(images)[-1]
                        teacher.decode([teachers], prompts)
                    loss = loss + distiller(from_teacher.pop(teachers), features)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        seconds: dict[str, list[float]] = {route: [] for route in ROUTES}
        with FeatureCollector(teacher) as from_teacher, FeatureCollector(student) as from_student:
            for attempt in range(options.rounds + 1):
                for route in ROUTES:
                    started = time.perf_counter()
                    step(route)
                    if attempt:  # the first warms up
                        seconds[route].append(time.perf_counter() - started)

    alone = median(seconds["no teacher"])
    precision = "bfloat16" if options.bf16 else "float32"
    print(
        f"{options.package} {options.model}, batch {len(images)}, {images.shape[-1]} pixels, ",
        end="",
    )
    print(f"{precision}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    for route, times in seconds.items():
        print(f"{route:20}{1e3 * median(times):12.1f} ms{median(times) / alone:8.3f} ×")


if __name__ == "__main__":
    main()
