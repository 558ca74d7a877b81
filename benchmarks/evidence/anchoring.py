"""How alike the places of an image are to a student and to its teacher, without a P x P matrix.

The cosines of all places make a Gram matrix for each of the two. Its norms and inner products are
those of D x D matrices, which are summed over blocks of places: neither the P x P matrices nor maps
of unit length are ever whole. `python benchmarks/evidence/anchoring.py` measures a loss made of
them, forward and backward at SAM's shape, against the matrices themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure import DEVICE, bandwidth, in_turns, peak_memory
from renyi_kd import InfoSAMDistiller
from renyi_kd._autograd import first_derivative_only

BLOCK = 256  # places, so that what is in use stays below a tenth of the maps of four images
SHORTEST = 1e-12  # as a place of zeros has no direction

Step = Callable[[], object]


def inner_products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return those of the Gram matrices of all places' cosines, for each image.

    Args:
        student: An embedding, shape (B, D, h, w).
        teacher: An embedding of the same shape, which passes no gradient.

    Returns:
        The squared norm of the student's matrix, its inner product with the teacher's, and the
        squared norm of the teacher's, shape (B,) each.
    """
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"`student` and `teacher` must have the same shape, got {shapes}.")
    with torch.autocast(student.device.type, enabled=False):
        return _InnerProducts.apply(student.flatten(2), teacher.flatten(2))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Cauchy-Schwarz divergence of these matrices in bits, for each image."""
    of_student, of_both, of_teacher = inner_products(student, teacher)
    return of_student.log2() + of_teacher.log2() - 2 * of_both.log2()


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the cosines of all places, for each image."""
    of_student, of_both, of_teacher = inner_products(student, teacher)
    return (of_student - 2 * of_both + of_teacher) / student[0, 0].numel() ** 2


class _InnerProducts(torch.autograd.Function):
    """Those of maps (B, D, P), with D x D products Z Zᵀ in place of the P x P products Zᵀ Z."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(student, teacher)
        size = student.shape[1]
        buffer, to_both = _buffer(student, 2 * size * BLOCK), _buffer(student, size, 2 * size)
        of_teacher = _buffer(student, size, size)
        found = []
        for maps in zip(student, teacher, strict=True):
            to_both.zero_()
            of_teacher.zero_()
            for _, unit, _ in _unit_blocks(*maps, buffer):
                to_both.addmm_(unit[:size], unit.mT)
                of_teacher.addmm_(unit[size:], unit[size:].mT)
            products = (*to_both.split(size, dim=1), of_teacher)
            found.append(torch.stack([x.square().sum() for x in products]))
        return torch.stack(found).unbind(1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(weights[0].device.type, enabled=False):
            return _gradient(*ctx.saved_tensors, *weights[:2]), None


def _gradient(student: Tensor, teacher: Tensor, of_student: Tensor, of_both: Tensor) -> Tensor:
    """Return the gradient of the student's maps, from those of the first two inner products."""
    size = student.shape[1]
    buffer, to_both = _buffer(student, 2 * size * BLOCK), _buffer(student, size, 2 * size)
    gradient = torch.empty_like(student)
    for image, maps in enumerate(zip(student, teacher, strict=True)):
        to_both.zero_()
        for _, unit, _ in _unit_blocks(*maps, buffer):
            to_both.addmm_(unit[:size], unit.mT)
        to_both[:, :size] *= 4 * of_student[image]
        to_both[:, size:] *= 2 * of_both[image]
        for block, unit, length in _unit_blocks(*maps, buffer):
            wanted, along = to_both @ unit, unit[:size]
            wanted -= along * (along * wanted).sum(0)  # what makes it longer changes no cosine
            wanted /= length
            gradient[image, :, block] = wanted
    return gradient


def _unit_blocks(
    student: Tensor, teacher: Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of places of two maps (D, P).

    With each come the places of both maps at unit length, one over the other, in the buffer, and
    the lengths that the student's had.
    """
    for start in range(0, student.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        pair = [x[:, block].to(buffer.dtype) for x in (student, teacher)]
        unit = buffer[: 2 * pair[0].numel()].view(2, *pair[0].shape)
        lengths = []
        for place, rows in zip(unit, pair, strict=True):
            lengths.append(rows.square().sum(0).sqrt_().clamp_(min=SHORTEST))
            torch.div(rows, lengths[-1], out=place)
        yield block, unit.flatten(0, 1), lengths[0]


def _buffer(like: Tensor, *shape: int) -> Tensor:
    """Return a tensor to write to, in float32 or wider."""
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def by_matrices(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the same divergence of the P x P matrices."""
    one, other = (F.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    a, b = one.mT @ one, other.mT @ other
    lengths = a.square().sum((1, 2)).log2() + b.square().sum((1, 2)).log2()
    return lengths - 2 * (a * b).sum((1, 2)).log2()


def main() -> None:
    """Print time and memory beside those of the InfoSAM loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="of which medians are taken")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--grid", type=int, default=64, help="rows and columns of an embedding")
    parser.add_argument("--width", type=int, default=256, help="channels of an embedding")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = (options.batch, options.width, options.grid, options.grid)
    teacher = torch.randn(shape, device=DEVICE)
    student = (teacher + 0.3 * torch.randn_like(teacher)).requires_grad_()
    token = torch.randn(options.batch, 1, options.width, device=DEVICE)
    others = token.clone().requires_grad_()
    distiller = InfoSAMDistiller(options.width).to(DEVICE)
    inputs = (student, others, *distiller.parameters())

    def step_of(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return lambda: torch.autograd.grad(loss(student, teacher).mean(), student)

    steps: dict[str, Step] = {
        "InfoSAM": lambda: torch.autograd.grad(
            distiller((teacher, token), (student, others)), inputs
        ),
        "divergence, D x D": step_of(divergence),
        "squares, D x D": step_of(squares),
        "divergence, P x P": step_of(by_matrices),
    }
    left, right = student.detach().flatten(2), teacher.flatten(2)
    product = "a product of D x P by P x D"
    times = in_turns(steps | {product: lambda: left @ right.mT}, options.rounds)
    floor = 7 * times.pop(product)  # three forward, two more to make them anew, two of blocks
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}, {shape},")
    print(f"forward and backward; a large copy reads and writes {bandwidth() / 1e9:.0f} GB/s\n")
    print("| loss | ms | × InfoSAM | × seven products | memory beyond the gradient, maps |")
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        extra = peak_memory(steps[name]) / teacher.nbytes - 1
        ratios = f"{taken / times['InfoSAM']:.1f} | {taken / floor:.1f}"
        print(f"| {name} | {1e3 * taken:.1f} | {ratios} | {extra:.2f} |")


if __name__ == "__main__":
    main()
