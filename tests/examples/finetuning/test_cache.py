"""The teacher's embeddings on disk: what is read is right, or it is not read."""

import errno
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning_runs import FINETUNING, build
from PIL import Image

from parts.data.batches import MaskedImages, collate
from parts.data.frame import Frame
from parts.data.prompts import Prompts
from parts.data.tables import Row
from parts.files import digest
from parts.training.cache import CachedEncoder, teacher_encoder
from renyi_kd import FeatureCollector


@pytest.fixture
def rows(tmp_path: Path):
    for i in range(6):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        Image.fromarray(pixels[..., 0] > 128).save(tmp_path / f"{i}_mask.png")
    return [Row(tmp_path / f"{i}.png", tmp_path / f"{i}_mask.png", str(i)) for i in range(6)]


@pytest.fixture
def teacher():
    return build("sam").requires_grad_(False)


def batches(teacher, rows):
    data = MaskedImages(rows, teacher.frame)
    return [collate([data[i] for i in index]) for index in ((4, 1), (0, 2), (5, 3))]


def cached(teacher, rows, folder: Path, **others: object) -> CachedEncoder:
    options = {"cache_dtype": "float16", "precision": "no", "image_range": None} | others
    options |= {"teacher_cache": folder / "cache", "distiller": "infosam"}
    digests = [digest(row.image) for row in rows]
    encode = teacher_encoder(teacher, digests, Namespace(**options))
    assert isinstance(encode, CachedEncoder)
    return encode


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("bfloat16", 4e-3)])
def test_what_is_read_is_what_the_teacher_gives(
    dtype: str, tolerance: float, teacher, rows, tmp_path: Path, capsys
) -> None:
    encode = cached(teacher, rows, tmp_path, cache_dtype=dtype)
    size = 6 * 64 * 16 * 16 * 2
    assert f"{size / 1e6:.1f} MB to write" in capsys.readouterr().out
    given = batches(teacher, rows)
    first = [encode(batch)[0] for batch in given]
    for batch, embedding in zip(given, first, strict=True):
        with torch.no_grad():
            exact = teacher.encode(batch.images)[-1]
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding, exact, rtol=tolerance, atol=1e-4)
        assert torch.equal(embedding, exact.to(encode.dtype).float())  # read back the first time

    def encoder_must_not_run(*_) -> None:
        raise AssertionError

    hook = teacher.encoder.register_forward_pre_hook(encoder_must_not_run)
    again = cached(teacher, rows, tmp_path, cache_dtype=dtype)
    assert "found" in capsys.readouterr().out
    assert all(torch.equal(x, again(batch)[0]) for x, batch in zip(first, given, strict=True))
    hook.remove()


def test_anything_else_is_another_cache(teacher, rows, tmp_path: Path) -> None:
    paths = [cached(teacher, rows, tmp_path).path]
    paths.append(cached(teacher, rows, tmp_path, cache_dtype="bfloat16").path)
    paths.append(cached(teacher, rows, tmp_path, image_range=[0, 4095]).path)
    paths.append(cached(teacher, rows, tmp_path, precision="bf16").path)
    paths.append(cached(teacher, rows[::-1], tmp_path).path)
    Image.open(rows[0].image).rotate(90).save(rows[0].image)
    paths.append(cached(teacher, rows, tmp_path).path)
    with torch.no_grad():
        next(teacher.decoder.parameters()).view(-1)[0] += 1e-6
    paths.append(cached(teacher, rows, tmp_path).path)
    teacher.frame = Frame(teacher.frame.size, keep_aspect=False)
    paths.append(cached(teacher, rows, tmp_path).path)
    assert len(set(paths)) == len(paths)


def assert_goes_on_after_the_first_batch(teacher, rows, folder: Path) -> None:
    """The second batch was cut short; it and the third are computed, and all is right."""
    encode = cached(teacher, rows, folder)
    assert [*encode.whole] == [0, 1, 0, 0, 1, 0]
    for batch in batches(teacher, rows):
        with torch.no_grad():
            exact = teacher.encode(batch.images)[-1]
        assert torch.equal(encode(batch)[0], exact.half().float())
    assert all(cached(teacher, rows, folder).whole)


def test_a_stop_in_mid_write(teacher, rows, tmp_path: Path, monkeypatch) -> None:
    encode, given = cached(teacher, rows, tmp_path), batches(teacher, rows)
    encode(given[0])
    pwrite = os.pwrite

    def half(file: int, content, offset: int) -> None:
        pwrite(file, bytes(len(memoryview(content)) // 2), offset)  # zeros, and then no more
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(KeyboardInterrupt):
        encode(given[1])
    monkeypatch.undo()
    assert_goes_on_after_the_first_batch(teacher, rows, tmp_path)


KILLED = """
import os, signal, sys
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, {finetuning!r})
import torch
from parts.models import sam
from parts.files import digest
from parts.training.cache import CachedEncoder, teacher_encoder
from parts.data.batches import MaskedImages, collate
from parts.data.tables import Row

torch.set_num_threads(1)  # as in the tests: more would round otherwise
torch.manual_seed(0)
teacher = sam.build("tiny", None).eval().requires_grad_(False)
folder = Path({folder!r})
rows = [Row(folder / f"{{i}}.png", folder / f"{{i}}_mask.png", str(i)) for i in range(6)]
data = MaskedImages(rows, teacher.frame)
options = Namespace(teacher_cache=folder / "cache", cache_dtype="float16", precision="no")
options.image_range, options.distiller = None, "infosam"
encode = teacher_encoder(teacher, [digest(row.image) for row in rows], options)
encode(collate([data[4], data[1]]))
pwrite = os.pwrite
def half(file, content, offset):
    pwrite(file, bytes(len(memoryview(content)) // 2), offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = half
encode(collate([data[0], data[2]]))
"""


@pytest.mark.slow
def test_a_kill_in_mid_write(teacher, rows, tmp_path: Path) -> None:
    code = KILLED.format(finetuning=str(FINETUNING), folder=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert_goes_on_after_the_first_batch(teacher, rows, tmp_path)


def test_read_only_and_full_disks(teacher, rows, tmp_path: Path, monkeypatch) -> None:
    given = batches(teacher, rows)
    encode = cached(teacher, rows, tmp_path)
    first = [encode(batch)[0] for batch in given]
    open_file = os.open

    def read_only(path, flags, *arguments, **options) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    whole = cached(teacher, rows, tmp_path)
    assert all(torch.equal(x, whole(batch)[0]) for x, batch in zip(first, given, strict=True))
    whole.path.with_suffix(".whole").write_bytes(b"\1\1\1\0\0\0")
    with pytest.raises(ValueError, match=r"--teacher-cache must be .* Read-only file system"):
        cached(teacher, rows, tmp_path)
    monkeypatch.undo()

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"0\.1 MB to write to.* No space left on device"):
        cached(teacher, rows[:4], tmp_path / "other")


@pytest.mark.parametrize("damage", ["truncate", "folder"])
def test_a_damaged_cache_is_named(damage: str, teacher, rows, tmp_path: Path) -> None:
    path, given = cached(teacher, rows, tmp_path).path, batches(teacher, rows)
    if damage == "truncate":
        os.truncate(path, 1000)
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=rf"^{path} of --teacher-cache is damaged, .* Remove it"):
        cached(teacher, rows, tmp_path)
    path.unlink() if path.is_file() else path.rmdir()
    assert cached(teacher, rows, tmp_path)(given[0])[0].isfinite().all()


def test_out_of_range(teacher, rows, tmp_path: Path) -> None:
    encode = cached(teacher, rows, tmp_path)
    with pytest.raises(ValueError, match="bfloat16"):
        encode.write([0], torch.full((1, 64, 16, 16), 1e6))


@pytest.mark.parametrize("family", ["sam2", "transformers-sam2"])
@torch.no_grad()
def test_mask_tokens_of_the_embedding_alone(family: str) -> None:
    """The finer levels of SAM2 reach the masks, not the tokens, so that they need no cache."""
    model = build(family)
    images, prompts = torch.randn(2, 3, 256, 256), Prompts(torch.tensor([[20.0, 30, 200, 180]] * 2))
    with FeatureCollector(model) as collector:
        model(images, prompts)
        expected = collector.pop()
        levels = model.encode(images)
        model.decode(levels[-1:], prompts)
        found = collector.pop(levels[-1])
    assert torch.equal(expected.mask_tokens, found.mask_tokens)
    assert torch.equal(expected.image_embedding, found.image_embedding)
