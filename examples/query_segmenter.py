"""Fine-tune a model that is no SAM with the loss: a small Mask2Former, in minutes on a CPU.

Its queries take the place of mask tokens, and its pixel features that of the image embedding, since
it makes each mask of a query and the pixel features. `FeatureCollector` finds both by the names of
their modules. The teacher learns everyday scenes first. Two students start from it and adapt to a
domain that looks like endoscopy, without and with the loss. Model and data are toys, and so are the
figures.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

# The scenes are those of the quickstart, which lie in the next folder.
sys.path.append(str(Path(__file__).parent / "quickstart"))

from renyi_kd import FeatureCollector, InfoSAMDistiller
from scenes import make_scenes

DIM, BATCH_SIZE = 32, 4


def build() -> Mask2FormerForUniversalSegmentation:
    """Return an untrained Mask2Former of 0.8 million parameters, for one class of objects."""
    backbone = SwinConfig(
        image_size=128,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=8,
        num_labels=1,
        train_num_points=1024,
    )
    return Mask2FormerForUniversalSegmentation(config)


def features(model: Mask2FormerForUniversalSegmentation) -> FeatureCollector:
    """Return a collector of pixel features (B, D, H, W) and queries (B, N, D)."""
    # The decoder applies its norm after every layer, and the last time counts. It works on
    # (N, B, D).
    queries = "decoder.layernorm", lambda output: output.transpose(0, 1)
    return FeatureCollector(model, image_embedding="mask_projection", mask_tokens=queries)


def scenes(domain: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return pictures (count, 3, 128, 128) and masks (count, 128, 128), half the drawn size."""
    drawn = make_scenes(domain, count, seed)
    images = torch.from_numpy(drawn.image).permute(0, 3, 1, 2).float() / 64 - 2
    masks = torch.from_numpy(drawn.mask)[:, None].float()
    return F.avg_pool2d(images, 2), F.avg_pool2d(masks, 2)[:, 0].round()


def batches(images: Tensor, masks: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random batches without an end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        yield images[chosen], masks[chosen]


def train(
    model: Mask2FormerForUniversalSegmentation,
    data: tuple[Tensor, Tensor],
    steps: int,
    name: str,
    teacher: Mask2FormerForUniversalSegmentation | None = None,
) -> Mask2FormerForUniversalSegmentation:
    """Train a model in place, and distil a teacher into it if there is one; return it."""
    torch.manual_seed(0)
    distiller = None if teacher is None else InfoSAMDistiller(dim=DIM)
    parameters = [*model.parameters(), *(distiller.parameters() if distiller else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=1e-4)
    endless = batches(*data, seed=0)
    model.train()
    with features(teacher or model) as from_teacher, features(model) as from_student:
        for _ in trange(steps, desc=name):
            images, masks = next(endless)
            loss = model(
                pixel_values=images,
                mask_labels=[*masks[:, None]],
                class_labels=[torch.zeros(1, dtype=torch.long)] * BATCH_SIZE,
            ).loss
            of_student = from_student.pop()
            if distiller is not None and teacher is not None:
                with torch.no_grad():
                    teacher(pixel_values=images)
                loss = loss + distiller(from_teacher.pop(), of_student)
            else:
                from_teacher.clear()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def mean_iou(model: Mask2FormerForUniversalSegmentation, data: tuple[Tensor, Tensor]) -> float:
    """Return the mean IoU of the masks of those queries that are surest to be an object."""
    images, masks = data
    output = model(pixel_values=images)
    surest = output.class_queries_logits.softmax(2)[..., 0].argmax(1)
    logits = output.masks_queries_logits[torch.arange(len(images)), surest]
    found = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0] > 0
    truth = masks > 0
    return ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Train the teacher and both students, and print how well they segment both domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretraining", type=int, default=600, help="steps of the teacher")
    parser.add_argument("--steps", type=int, default=150, help="steps of each student")
    parser.add_argument("--samples", type=int, default=64, help="scenes of the new domain")
    args = parser.parse_args(argv)
    if min(args.pretraining, args.steps, args.samples) < 1:
        parser.error("--pretraining, --steps and --samples must be positive")

    torch.manual_seed(0)
    everyday = scenes("source", 4 * args.samples, seed=0)
    teacher = train(build(), everyday, args.pretraining, "teacher").requires_grad_(False)
    new = scenes("target", args.samples, seed=1)
    models = {"teacher": teacher}
    for name, source in (("student", None), ("student + InfoSAM", teacher)):
        student = copy.deepcopy(teacher).requires_grad_(True)
        models[name] = train(student, new, args.steps, name, source)
    tests = scenes("target", 64, seed=2), scenes("source", 64, seed=3)
    print(f"{'mean IoU':20}{'new domain':>12}{'old domain':>12}")
    for name, model in models.items():
        print(f"{name:20}{mean_iou(model, tests[0]):12.3f}{mean_iou(model, tests[1]):12.3f}")


if __name__ == "__main__":
    main()
