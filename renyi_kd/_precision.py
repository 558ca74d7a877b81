"""What keeps its precision whatever autocast and `torch.set_float32_matmul_precision` allow."""

from functools import reduce

import torch

from renyi_kd._checks import TensorLike


def compute_dtype(*tensors: TensorLike) -> torch.dtype:
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
