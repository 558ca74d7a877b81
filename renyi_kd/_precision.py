"""The dtype of the arithmetic, whatever autocast and reduced matmul precision would make of it."""

from functools import reduce

import torch

from renyi_kd._checks import TensorLike

# Apple's MPS.
WITHOUT_FLOAT64: tuple[str, ...] = ("mps",)


def compute_dtype(*tensors: TensorLike) -> torch.dtype:
    """Return the dtype of a result: the arguments' dtypes promoted, and at least float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64."""
    return device.type not in WITHOUT_FLOAT64


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device."""
    return torch.float64 if has_float64(device) else torch.float32


def ieee_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which matrix products keep the digits of `dtype`.

    PyTorch may be set to multiply float32 matrices in TF32 or bfloat16. No such setting touches
    float64, which is therefore returned wherever one is in force, and by compiled code, in which
    the settings cannot be read; otherwise `dtype` is.
    """
    if not has_float64(device):  # nor a reduced precision
        return dtype
    if torch.compiler.is_compiling():
        return torch.float64
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    try:
        keeps_digits = backend.matmul.fp32_precision in ("none", "ieee")
    except AttributeError:  # PyTorch before 2.9 has one setting for all devices
        keeps_digits = torch.get_float32_matmul_precision() == "highest"
    return dtype if keeps_digits else torch.float64
