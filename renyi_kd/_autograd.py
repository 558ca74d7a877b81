"""Which derivatives a custom gradient serves: a first one, backwards."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward: TypeAlias = Callable[..., tuple[Tensor | None, ...]]


def needs_plain_formulas(*tensors: Tensor) -> bool:
    """Return whether derivatives are asked for that a custom gradient does not serve.

    These are derivatives in forward mode, which PyTorch takes for zero in custom operators, and
    those of `torch.func`. Formulas of PyTorch's own operators serve them.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    # Compiled code is traced without tangents. PyTorch itself refuses a tensor that has one there.
    return not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def gradients_by_operators(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> list[Tensor | None]:
    """Return the gradients of a function of PyTorch's own operators, which have gradients too.

    A custom gradient returns them where it is to be differentiated again. An input may depend on
    another: each gradient is that of its own argument alone.
    """
    learns = [x.requires_grad for x in inputs]
    with torch.enable_grad():
        arguments = [x.view_as(x) for x in inputs]
        output = function(*arguments)
    asked = [argument for argument, learn in zip(arguments, learns, strict=True) if learn]
    found = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))
    return [next(found) if learn else None for learn in learns]


def first_derivative_only(backward: Backward) -> Backward:
    """Decorate the `backward` of an autograd function whose gradient has no derivative.

    PyTorch has `once_differentiable` for this. But it only marks the gradient: if
    `torch.autograd.grad` reaches the inputs on another path as well, the missing part silently
    counts as zero. Here every path through the gradient ends in an error.
    """

    @wraps(backward)
    def without_graph(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *output_gradients)
        if not torch.is_grad_enabled():
            return gradients
        inputs = [*output_gradients, *ctx.saved_tensors]
        return tuple(None if g is None else _NoDerivative.apply(g, *inputs) for g in gradients)

    return without_graph


class _NoDerivative(torch.autograd.Function):
    """Passes a gradient on unchanged, and refuses to differentiate it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "The gradient of many samples or of an estimate has no derivative. "
            "Give the Gram matrix itself, `kernel(x)`, to an exact functional, as renyi_entropy."
        )
