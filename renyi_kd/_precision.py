"""What keeps its precision whatever autocast and `torch.set_float32_matmul_precision` allow."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a result: the promotion of the arguments' dtypes, at least float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def ieee_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float64 where TF32 or bfloat16 is allowed inside of float32 matrix products."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    try:
        ieee = backend.matmul.fp32_precision in ("none", "ieee")
    except AttributeError:  # before torch 2.9
        ieee = torch.get_float32_matmul_precision() == "highest"
    return dtype if ieee else torch.float64


@torch.library.custom_op("renyi_kd::ieee_linear", mutates_args=())
def ieee_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.mT`, both of one dtype, in the IEEE arithmetic of it, forward and backward.

    Args:
        x: shape `(..., D)`.
        weight: shape `(E, D)`.

    Returns:
        Shape `(..., E)`.
    """
    dtype = ieee_dtype(x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


@ieee_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad
    return (
        ieee_linear(grad, weight.mT) if for_x else None,
        ieee_linear(grad.flatten(0, -2).mT, x.flatten(0, -2).mT) if for_weight else None,
    )


ieee_linear.register_autograd(_backward, setup_context=_save_factors)
