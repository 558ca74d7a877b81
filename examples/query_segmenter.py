"""Fine-tune a model that is no SAM with the loss: a small Mask2Former, in minutes on a CPU.

Its queries take the place of mask tokens, and its pixel features that of the image embedding, since
it makes each mask of a query and the pixel features. `FeatureCollector` finds both by the names of
their modules. The teacher learns pictures like those of endoscopy. Two students start from it and
adapt to few pictures of a camera with other colours, without and with the loss. Model and data are
toys, and the figures say no more than that everything works.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
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
Model = Mask2FormerForUniversalSegmentation
Data = tuple[Tensor, Tensor]  # pictures (count, 3, 64, 64) and masks (count, 64, 64)


def build() -> Model:
    """Return an untrained Mask2Former of 0.7 million parameters, for one class of objects."""
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = SwinConfig(
        image_size=64, embed_dim=24, depths=[1] * 4, num_heads=[1, 1, 2, 4], window_size=4,
        out_features=stages, initializer_range=0.1,
    )  # fmt: skip
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), DIM)
    widths |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 2 * DIM)
    config = Mask2FormerConfig(
        backbone_config=backbone, **widths, encoder_layers=1, decoder_layers=3, init_std=0.1,
        num_attention_heads=4, num_queries=4, num_labels=1, train_num_points=1024,
    )  # fmt: skip
    return Model(config)


def collector(model: Model) -> FeatureCollector:
    """Return a collector of pixel features (B, D, H, W) and queries (B, N, D)."""
    # The decoder applies its norm after every layer, and the last time counts. It works on
    # (N, B, D).
    queries = "decoder.layernorm", lambda output: output.transpose(0, 1)
    return FeatureCollector(model, image_embedding="mask_projection", mask_tokens=queries)


def scenes(count: int, seed: int, *, other_colours: bool = False) -> Data:
    """Return pictures and masks, a quarter as wide as they are drawn."""
    drawn = make_scenes("target", count, seed)
    images = torch.from_numpy(drawn.image).permute(0, 3, 1, 2).float() / 64 - 2
    masks = torch.from_numpy(drawn.mask)[:, None].float()
    images = images.flip(1) if other_colours else images  # blue, green, red
    return F.avg_pool2d(images, 4), F.avg_pool2d(masks, 4)[:, 0].round()


def train(model: Model, data: Data, steps: int, name: str, teacher: Model | None = None) -> Model:
    """Train a model in place, and distil a teacher into it if there is one; return it."""
    torch.manual_seed(0)  # both students see the same batches
    distiller = InfoSAMDistiller(dim=DIM)
    optimizer = torch.optim.AdamW([*model.parameters(), *distiller.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30) * (1 - step / steps)
    )
    classes = [torch.zeros(1, dtype=torch.long)] * BATCH_SIZE
    model.train()
    of_teacher = nullcontext() if teacher is None else collector(teacher)
    with of_teacher as from_teacher, collector(model) as from_student:
        for _ in trange(steps, desc=name):
            chosen = torch.randint(len(data[0]), (BATCH_SIZE,))
            images, masks = (part[chosen] for part in data)
            masks = [*masks[:, None]]
            loss = model(pixel_values=images, mask_labels=masks, class_labels=classes).loss
            of_student = from_student.pop()
            if from_teacher is not None:
                with torch.no_grad():
                    teacher(pixel_values=images)
                loss = loss + distiller(from_teacher.pop(), of_student)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def mean_iou(model: Model, data: Data) -> float:
    """Return the mean IoU of the masks of those queries that are surest to be an object."""
    images, masks = data
    output = model(pixel_values=images)
    surest = output.class_queries_logits.softmax(2)[..., 0].argmax(1)
    logits = output.masks_queries_logits[torch.arange(len(images)), surest]
    found = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0] > 0
    truth = masks > 0
    return ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Train the teacher and both students, and print how well they segment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretraining", type=int, default=300, help="steps of the teacher")
    parser.add_argument("--steps", type=int, default=100, help="steps of each student")
    parser.add_argument("--samples", type=int, default=32, help="pictures with other colours")
    args = parser.parse_args(argv)
    if min(args.pretraining, args.steps, args.samples) < 1:
        parser.error("--pretraining, --steps and --samples must be positive")

    torch.manual_seed(0)
    teacher = train(build(), scenes(8 * args.samples, seed=0), args.pretraining, "teacher")
    teacher.requires_grad_(False)
    new = scenes(args.samples, seed=1, other_colours=True)
    models = {"teacher": teacher}
    for name, source in (("student", None), ("student + InfoSAM", teacher)):
        student = copy.deepcopy(teacher).requires_grad_(True)
        models[name] = train(student, new, args.steps, name, source)
    count = 2 * args.samples
    tests = scenes(count, seed=2, other_colours=True), scenes(count, seed=3)
    print(f"{'mean IoU':20}{'new colours':>12}{'old colours':>12}")
    for name, model in models.items():
        print(f"{name:20}{mean_iou(model, tests[0]):12.3f}{mean_iou(model, tests[1]):12.3f}")


if __name__ == "__main__":
    main()
