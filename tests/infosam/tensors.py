"""What the tests of the loss and its operators share: draws, layouts and errors."""

import torch
from torch import Tensor

LAYOUTS = {
    "channels first": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x,
    "strided": lambda x: torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.detach().double() - reference).norm() / reference.norm()).item()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).requires_grad_()
