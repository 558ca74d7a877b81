"""Argument checks. They read shapes, dtypes and devices, never values: no check waits for a GPU."""

from collections.abc import Iterable
from itertools import zip_longest
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TensorLike(Protocol):
    """A tensor, or an object that stands for one, as a `SampleGram` stands for its matrix."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def check_floating(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is a dense tensor of a real floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(
            f"`{name}` must be a dense tensor, got a {kind} one. Convert it first, for instance "
            f"with `.to_dense()` or torch.nested.to_padded_tensor."
        )
    if hasattr(value, "get_mask"):
        raise TypeError(
            f"`{name}` must not be a masked tensor, since a sample is whole or not there. "
            f"Select samples, or fill in the rest with `.to_tensor(0)`."
        )
    if value.dtype in _INTEGERS:
        raise TypeError(
            f"`{name}` must have a floating-point dtype, got {value.dtype}. The Gram matrix of "
            f"class labels is label_kernel(labels), and samples of them are "
            f"torch.nn.functional.one_hot(labels).float(). Convert numbers by `.float()`."
        )
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"`{name}` must have a floating-point dtype of 16, 32 or 64 bits, got {value.dtype}. "
            f"Convert it first, for instance with `.float()`."
        )


def check_gram(name: str, gram: Tensor) -> None:
    """Raise unless `gram` is a floating-point tensor of shape `(..., n, n)` with n >= 1."""
    check_floating(name, gram)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have shape (..., n, n), got {tuple(gram.shape)}. "
            f"Build it from samples with linear_kernel, rbf_kernel, ..."
        )


def check_real(name: str, value: object, *, minimum: float, exclusive: bool = False) -> float:
    """Return `value` as a float. Raise if it is no real number, NaN, or too small.

    Too small is a number below `minimum`, or with `exclusive` also `minimum` itself.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a real number, got {type(value).__name__}.")
    number = float(value)
    # The comparison is written so that NaN fails it. math.isnan would be clearer, but
    # torch.compile cannot trace it.
    if not (number > minimum if exclusive else number >= minimum):
        relation = ">" if exclusive else ">="
        raise ValueError(f"`{name}` must be a number {relation} {minimum:g}, got {number:g}.")
    return number


def check_integer(name: str, value: object, *, minimum: int) -> int:
    """Return `value` as an int. Raise if it is no integer, or below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be an integer >= {minimum}, got {value}.")
    return int(value)


def check_alpha(alpha: object) -> float:
    """Return `alpha` as a float. Raise unless it is a Rényi order: a number > 0, or infinity."""
    return check_real("alpha", alpha, minimum=0, exclusive=True)


def check_flag(name: str, value: object) -> bool:
    """Return `value`. Raise `TypeError` unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_same_device(**tensors: TensorLike) -> None:
    """Raise `ValueError` unless all `tensors` are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"`{name}` on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"All tensors must be on one device, got {found}. Move them with `.to()`.")


def check_batch_dimensions(tensors: Iterable[TensorLike]) -> None:
    """Raise `ValueError` unless the dimensions before the last two broadcast."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    for sizes in zip_longest(*(reversed(shape[:-2]) for shape in shapes), fillvalue=1):
        not_one = [size for size in sizes if size != 1]
        # A set would make symbolic sizes constant.
        if any(size != not_one[0] for size in not_one):
            raise ValueError(f"Leading batch dimensions must broadcast, got shapes {shapes}.")
