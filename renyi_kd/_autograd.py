"""Functions whose gradient cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

Backward: TypeAlias = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(backward: Backward) -> Backward:
    """Make the second derivative through a `backward` an error, not zero.

    PyTorch's `once_differentiable` is passed by without an error where `torch.autograd.grad` finds
    another way to its inputs.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        inputs = [*grads, *ctx.saved_tensors]
        return tuple(None if x is None else _Undifferentiable.apply(x, *inputs) for x in gradients)

    return checked


class _Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "The gradient of many samples or of an estimate has no derivative. "
            "Give the Gram matrix itself, as `kernel(x)`, and an exact method."
        )
