"""What all kernels ask before they are launched."""

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's device current, since Triton launches on the current one."""
    return torch.cuda.device(tensor.device)


def block_of(number: int) -> int:
    """Return the power of two that holds so many elements; an empty batch has a block, too."""
    block: int = triton.next_power_of_2(max(1, number))
    return block


def warps(block: int) -> int:
    """Return how many warps hold a square matrix of this size."""
    return 1 if block <= 8 else 4 if block <= 32 else 8
