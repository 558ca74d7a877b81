"""The Gram matrix over a batch of feature maps, without copies of the maps (InfoSAM, Eq. 19).

A feature map has a million features a sample, and a float64 copy of it would cost more than the
rest of the loss. So the products of long samples are summed in float32 over short chunks, and the
chunks are summed in float64.
"""

from typing import Any

import torch
from torch import Tensor

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._precision import has_float64, ieee_dtype
from renyi_kd.information.products import matrix_product

# From this number of features on, products are summed in float32 over chunks of `_CHUNK` features,
# with a relative rounding error of 6e-8 for each chunk. Over all chunks these average out to some
# 1e-9. Of half-precision features 1e-8 is left, since the squares of numbers with few binary digits
# are rounded down more often than up.
_LONG = 2**18
_CHUNK = 128

# The largest number of elements of a block's copy in another dtype or, where no copy is made, of
# the Gram matrices of its chunks.
_BLOCK = 2**17


def batch_gram(samples: Tensor) -> Tensor:
    """Return the Gram matrix of the linear kernel over a batch of feature maps, each flattened.

    Args:
        samples: shape `(B, ...)`, in any memory layout. They are read once, and not copied if they
            are dense.

    Returns:
        Gram matrix, shape `(B, B)`, float64. It has no second derivative. It is on the CPU if the
        device has no float64.
    """
    if not has_float64(samples.device):
        return _batch_gram_on_cpu(samples)
    if needs_plain_formulas(samples):
        rows = samples.flatten(1).double()
        return rows @ rows.mT
    gram: Tensor = batch_gram_operator(samples)
    return gram


def _batch_gram_on_cpu(samples: Tensor) -> Tensor:
    """Sum the products over short chunks on the device, and the sums of all chunks on the CPU."""
    rows = samples.flatten(1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _CHUNK))
    chunks = rows.view(rows.shape[0], -1, _CHUNK).transpose(0, 1)
    return matrix_product(chunks, chunks.mT).cpu().sum(dim=0, dtype=torch.float64)


def batch_gram_by_blocks(samples: Tensor) -> Tensor:
    """Return what `batch_gram` does, block by block, each copied only if its dtype asks for it."""
    rows = in_memory_order(samples).flatten(1)
    batch = rows.shape[0]
    dtype = torch.float64
    if sums_in_chunks(samples):
        dtype = ieee_dtype(torch.float32, samples.device)
    width = max(1, _BLOCK // batch // (batch if rows.dtype == dtype else _CHUNK)) * _CHUNK
    gram = rows.new_zeros(batch, batch, dtype=torch.float64)
    with torch.autocast(rows.device.type, enabled=False):
        for block in torch.split(rows, width, dim=1):
            if dtype == torch.float32 and block.shape[1] % _CHUNK == 0:
                chunks = block.to(dtype).view(batch, -1, _CHUNK).transpose(0, 1)
                gram += (chunks @ chunks.mT).sum(dim=0, dtype=torch.float64)
            else:
                gram += block.double() @ block.double().mT
    return gram


batch_gram_operator = torch.library.custom_op(
    "renyi_kd::sample_gram", batch_gram_by_blocks, mutates_args=()
)


@batch_gram_operator.register_fake
def _batch_gram_shape(samples: Tensor) -> Tensor:
    return samples.new_empty(samples.shape[0], samples.shape[0], dtype=torch.float64)


def batch_gram_backward_by_blocks(grad_gram: Tensor, samples: Tensor) -> Tensor:
    """Return the gradient of the samples, in their layout."""
    symmetric = grad_gram + grad_gram.mT
    rows = in_memory_order(samples).flatten(1)
    grad_samples = dense_in_memory_order(samples)
    grad_rows = grad_samples.permute(0, *memory_order(samples)).flatten(1)
    # On a GPU there is no cache to keep a block in.
    width = max(1, (_BLOCK if rows.is_cpu else rows.numel()) // rows.shape[0])
    blocks = (torch.split(x, width, dim=1) for x in (rows, grad_rows))
    for block, grad_block in zip(*blocks, strict=True):
        grad_block.copy_(symmetric @ block.double())
    return grad_samples


batch_gram_backward_operator = torch.library.custom_op(
    "renyi_kd::sample_gram_backward", batch_gram_backward_by_blocks, mutates_args=()
)


@batch_gram_backward_operator.register_fake
def _batch_gram_backward_shape(grad_gram: Tensor, samples: Tensor) -> Tensor:
    return dense_in_memory_order(samples)


def _save_samples(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient_of_samples(ctx: Any, grad_gram: Tensor) -> Tensor:
    grad_samples: Tensor = batch_gram_backward_operator(grad_gram, *ctx.saved_tensors)
    return grad_samples


batch_gram_operator.register_autograd(_gradient_of_samples, setup_context=_save_samples)


def batch_gram_error(samples: Tensor) -> float:
    """Return the relative rounding error of the entries of `batch_gram`."""
    if not sums_in_chunks(samples):
        return torch.finfo(torch.float64).eps
    # The tensor cores of a GPU cut off digits where other units round.
    return 1e-8 if samples.is_cpu else 1e-7


def sums_in_chunks(samples: Tensor) -> bool:
    """Return whether products are summed in float32 over chunks, whose errors average out."""
    return samples.dtype != torch.float64 and samples.shape[1:].numel() >= _LONG


def in_memory_order(samples: Tensor) -> Tensor:
    """Return the samples with axes in `memory_order`, so that dense ones flatten to a view."""
    return samples.permute(0, *memory_order(samples))


def memory_order(samples: Tensor) -> list[int]:
    """Return the axes of a sample from the slowest to the fastest in memory."""
    return sorted(range(1, samples.ndim), key=samples.stride, reverse=True)


def dense_in_memory_order(samples: Tensor) -> Tensor:
    """Return an empty, dense tensor of the same shape, with its axes in memory as in `samples`."""
    axes = memory_order(samples)
    dense = samples.new_empty(samples.shape[0], *(samples.shape[axis] for axis in axes))
    return dense.permute(0, *(1 + axes.index(axis) for axis in range(1, samples.ndim)))
