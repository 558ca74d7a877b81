"""The teacher's image embeddings, computed once and kept on disk.

By hand, so that the space for all of them is reserved before the first is written.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from parts import files
from parts.data.batches import Batch
from parts.errors import InputError, describe
from parts.models.segmenter import Segmenter


def teacher_encoder(
    teacher: Segmenter, images: list[str], options: argparse.Namespace
) -> Callable[[Batch], list[Tensor]]:
    """Return a function from a batch to what the teacher's decoder needs.

    It is the teacher's encoder, or a cache, which has the image embeddings alone. `images` are the
    digests of the files, in the order of the rows.
    """
    if options.teacher_cache is None or options.distiller == "none":
        return lambda batch: teacher.encode(batch.images)
    precision, read = options.precision, options.image_range
    name = key(teacher, images, options.cache_dtype, precision, read)
    return CachedEncoder(
        teacher, len(images), options.teacher_cache / name, getattr(torch, options.cache_dtype)
    )


class CachedEncoder:
    """The image embeddings of a frozen teacher for the rows of a data set.

    An embedding depends on the image alone. It is computed when it is first asked for, and then
    read back from the file, where it is rounded to `dtype`. The first epoch therefore sees the same
    values as later ones, and as a run that is resumed.

    The name of the file is the `key` of everything that the embeddings depend on. A cache of
    anything else has another name and is not found.

    A second file holds a mark for each embedding, which is set after the embedding has reached the
    disk. An embedding that a kill cut short has no mark, and is computed again.

    Args:
        teacher: The teacher, in eval mode and frozen.
        count: The number of rows of the data set.
        path: The file. Several runs may share it.
        dtype: The dtype on disk.

    Raises:
        InputError: If the file is damaged, or if it cannot be written to although embeddings are
            missing.
    """

    def __init__(self, teacher: Segmenter, count: int, path: Path, dtype: torch.dtype) -> None:
        self.teacher, self.path, self.dtype = teacher, path, dtype
        side = teacher.frame.size // teacher.stride
        self.shape = teacher.dim, side, side
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        size = count * self.bytes
        whole = path.with_suffix(".whole")
        try:
            found = whole.read_bytes() if whole.exists() and path.exists() else b""
            if len(found) != count:
                print(f"Teacher cache: {size / 1e6:.1f} MB to write to {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    reserve(file.fileno(), size)
                found = bytes(count)
                files.replace(whole, found)
            elif all(found):
                print(f"Teacher cache: all of {size / 1e6:.1f} MB found in {path}")
            if (there := path.stat().st_size) != size or not path.is_file():
                raise InputError(
                    f"{path} of --teacher-cache is damaged, it must have {size} bytes, has "
                    f"{there}. Remove it, and it is computed again."
                )
            self.whole = bytearray(found)
            self.marks = None if all(found) else os.open(whole, os.O_RDWR)
            self.file = os.open(path, os.O_RDONLY if all(found) else os.O_RDWR)
        except OSError as error:
            raise InputError(
                f"--teacher-cache must be a folder with {size / 1e6:.1f} MB to write to, got "
                f"{path.parent}: {describe(error)}"
            ) from error
        numbers = size // dtype.itemsize
        stored = torch.from_file(str(path), shared=False, size=numbers, dtype=dtype)
        self.embeddings = stored.view(count, *self.shape)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Tensor]:
        """Return a list of the image embeddings (B, D, h, w) of a batch alone, in float32."""
        if not all(self.is_whole(i) for i in batch.index):
            self.write(batch.index, self.teacher.encode(batch.images)[-1])
        return [self.embeddings[batch.index].to(batch.images.device).float()]

    def is_whole(self, i: int) -> bool:
        """Return whether the file holds an embedding; another process may have written it."""
        if not self.whole[i]:
            self.whole[i] = os.pread(self.marks, 1, i) == b"\1"
        return bool(self.whole[i])

    def write(self, index: list[int], embeddings: Tensor) -> None:
        """Write embeddings, wait until they are on the disk, and then mark them as whole."""
        rounded = embeddings.to(self.dtype).cpu().contiguous()
        if not rounded.isfinite().all():
            option = "--cache-dtype" if embeddings.isfinite().all() else "--precision"
            raise InputError(f"{option} cannot hold the teacher's embeddings; take bfloat16")
        for i, embedding in zip(index, rounded, strict=True):
            os.pwrite(self.file, embedding.view(torch.uint8).numpy(), i * self.bytes)
        os.fsync(self.file)
        for i in index:
            os.pwrite(self.marks, b"\1", i)
            self.whole[i] = 1


def key(teacher: Segmenter, images: list[str], *others: object) -> str:
    """Return a name that changes with anything that the embeddings depend on.

    Args:
        teacher: Its weights and its preprocessing count.
        images: The digests of the files, in the order of the rows.
        others: How the files are read, the precision in which the teacher runs, and the dtype on
            disk.
    """
    state = hashlib.sha256()
    state.update(repr((teacher.frame, images, others, torch.__version__)).encode())
    for name, value in sorted(teacher.state_dict().items()):
        state.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        state.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:32]


def reserve(file: int, size: int) -> None:
    """Reserve the space on the disk, so that it cannot run out later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
