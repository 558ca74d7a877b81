"""What the compared systems cost: `python benchmarks/compared.py`.

For each distiller, on what a pass of ViT-B leaves of four images: the parameters that it learns,
its weighted loss where the student's features are the teacher's with noise of 0.3 deviations, the
memory that forward and backward allocate at their peak, and their time, beside that of InfoSAM in
the same run. The floor is the time in which what is compared can be read once, of student and
teacher, and the student's gradients be written once.

For each fine-tuning method, on a SAM of ViT-B's width with one block of windows and one of global
attention, and one image: the parameters that train in a whole ViT-B, and memory and time of a step
beside those of training the decoder alone.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "finetuning"))

from measure import DEVICE, bandwidth, in_turns, peak_memory
from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.distillers.base import EMBEDDING, LAYERS, LOGITS, TOKENS, Pass
from parts.distillers.choice import KINDS, build_distiller
from parts.models.adaptation import adapt
from parts.models.methods.convlora import load_loss
from parts.models.sam import SegmentAnything
from parts.options import DISTILLERS, METHODS

BATCH, WIDTH, GRID, LAYERS_OF_VIT_B = 4, 768, 64, [2, 5, 8, 11]
MEGA = 1e6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the program")
    options = parser.parse_args()
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    distillers(options.rounds, grid=8 if options.small else GRID)
    print()
    methods(options.rounds, size=128 if options.small else 1024)


def distillers(rounds: int, grid: int) -> None:
    """Print the table of the distillers."""
    model = vit_b_of_two_blocks(size=128)
    base = Namespace(batch_size=BATCH, processes=1, teacher_cache=None, relation="attention-1")
    base.relation_from, base.freeze_relation, base.without_regularization = None, False, False
    base.alpha, base.compression_weight, base.distillation_weight = 2.0, 1.0, 0.5
    teacher = make_pass(grid)
    student = noisy(teacher)
    masks = torch.rand(BATCH, 16 * grid, 16 * grid, device=DEVICE) > 0.5
    steps: dict[str, Callable[[], object]] = {}
    lines = {}
    for name in KINDS:
        distiller = build_for_four_layers(Namespace(distiller=name, **vars(base)), model)
        distiller.to(DEVICE)
        learned = [p for p in distiller.parameters() if p.requires_grad]
        needed = compared(student, distiller.needs)

        def step(distiller=distiller, inputs=(*needed, *learned)) -> None:
            torch.autograd.grad(distiller(teacher, student, masks), inputs, allow_unused=True)

        steps[name] = step
        moved = 3 * sum(x.numel() * x.element_size() for x in needed)
        loss = DISTILLERS[name] * distiller(teacher, student, masks).item()
        lines[name] = (sum(p.numel() for p in learned), loss, peak_memory(step), moved)
    times, copy = in_turns(steps, rounds), bandwidth()
    print("| distiller | learns | weighted loss | peak, MB | ms | × InfoSAM | × floor |")
    print("|---|---|---|---|---|---|---|")
    for name, (learned, loss, peak, moved) in lines.items():
        seconds = times[name]
        print(
            f"| {name} | {learned:,} | {loss:.2g} | {peak / MEGA:.1f} | {1e3 * seconds:.1f} "
            f"| {seconds / times['infosam']:.2f} | {seconds * copy / moved:.1f} |"
        )


def build_for_four_layers(options: Namespace, model: SegmentAnything) -> nn.Module:
    """Return a distiller of four layers as wide as those of the model."""
    blocks = model.model.image_encoder.blocks
    model.model.image_encoder.blocks = nn.ModuleList([*blocks, *blocks])
    options.layers = options.teacher_layers = [0, 1, 2, 3]
    try:
        return build_distiller(options, model, model)
    finally:
        model.model.image_encoder.blocks = blocks


def make_pass(grid: int) -> Pass:
    """Return what a pass of ViT-B leaves, of random numbers."""
    draw = partial(torch.randn, BATCH, device=DEVICE)
    layers = [draw(WIDTH, grid, grid) for _ in LAYERS_OF_VIT_B]
    return Pass(layers, draw(256, grid, grid), draw(1, 256), draw(4 * grid, 4 * grid))


def noisy(other: Pass) -> Pass:
    """Return a pass that is another one with noise, and learns."""

    def change(tensor: Tensor) -> Tensor:
        return (tensor + 0.3 * torch.randn_like(tensor)).requires_grad_()

    parts = (other.embedding, other.tokens, other.logits)
    return Pass(list(map(change, other.layers)), *map(change, parts))


def compared(one: Pass, needs: tuple[str, ...]) -> list[Tensor]:
    """Return what a distiller compares of a pass."""
    parts = {LAYERS: one.layers, EMBEDDING: [one.embedding], TOKENS: [one.tokens]}
    parts[LOGITS] = [one.logits]
    return [tensor for need in needs for tensor in parts[need]]


def methods(rounds: int, size: int) -> None:
    """Print the table of the fine-tuning methods."""
    images = torch.randn(1, 3, size, size, device=DEVICE)
    prompts = Prompts(torch.tensor([[0.2, 0.3, 0.7, 0.8]], device=DEVICE).mul(size))
    steps: dict[str, Callable[[], object]] = {}
    lines = {}
    for method in METHODS:
        model = vit_b_of_two_blocks(size).to(DEVICE)
        adapt(model, method, targets=["qkv"])
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]

        def step(model=model, learned=learned) -> None:
            loss = model(images, prompts).square().mean()
            load = load_loss(model)
            loss = loss if load is None else loss + load
            torch.autograd.grad(loss, learned, allow_unused=True)

        steps[method] = step
        lines[method] = peak_memory(step)
    times = in_turns(steps, rounds)
    print("| method | trains in ViT-B | peak, MB | ms | × decoder |")
    print("|---|---|---|---|---|")
    for method, peak in lines.items():
        seconds = times[method]
        print(
            f"| {method} | {trained_of_vit_b(method):,} | {peak / MEGA:.0f} | {1e3 * seconds:.0f} "
            f"| {seconds / times['decoder']:.2f} |"
        )


def vit_b_of_two_blocks(size: int) -> SegmentAnything:
    """Return a SAM as wide as ViT-B, with a block of windows and one of global attention."""
    torch.manual_seed(0)
    with torch.device("meta"):
        sam = sam_model_registry["vit_b"]()
    sam = sam.to_empty(device="cpu")
    sam.image_encoder = ImageEncoderViT(
        img_size=size,
        embed_dim=WIDTH,
        depth=2,
        num_heads=12,
        out_chans=256,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
    )
    for parameter in (*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()):
        nn.init.normal_(parameter, std=0.02)
    nn.init.normal_(sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix)
    sam.prompt_encoder.image_embedding_size = (size // 16, size // 16)
    sam.prompt_encoder.input_image_size = (size, size)
    return SegmentAnything(sam, Frame(size, keep_aspect=True), 256)


def trained_of_vit_b(method: str) -> int:
    """Return how many parameters a method trains in a whole ViT-B, the decoder included."""
    with torch.device("meta"):
        model = SegmentAnything(sam_model_registry["vit_b"](), Frame(1024, keep_aspect=True), 256)
        adapt(model, method, targets=["qkv"])
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
