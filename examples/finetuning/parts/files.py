"""Files and folders that appear whole or not at all, and never take the place of another.

By hand, as the packages for atomic files know no folders.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from parts.errors import InputError, os_error_behind

UNFINISHED = ".unfinished"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
UNFINISHED_NAME = rf"\.\w{{8}}\{UNFINISHED}"  # what follows the name that is meant, as a pattern


def refuse_existing(paths: Iterable[Path]) -> None:
    """Raise `InputError` if there is a file, or a folder that is not empty, at one of the paths."""
    existing = [path for path in paths if os.path.lexists(path) and not is_empty_folder(path)]
    if existing:
        more = f", and {len(existing) - 1} more" if existing[1:] else ""
        raise InputError(
            f"{existing[0]} exists{more}; nothing is written over it. Name another place, or "
            "remove it yourself."
        )


def is_empty_folder(path: Path) -> bool:
    """Return whether there is a folder with nothing in it."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a place beside `path`, to make a file or folder there, which is then moved to `path`.

    What is written is on the disk before it gets its name. If the block fails, or the process is
    killed, nothing has the name. Folders above it are made.

    Raises:
        InputError: If `path` exists, before or after the block, and is not an empty folder.
        OSError: If the disk is full or cannot be written to; it names `path`.
    """
    refuse_existing([path])
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(path) as place, _naming(path, place):
            yield place
            for part in [place, *(place.rglob("*") if place.is_dir() else ())]:
                sync(part)
            _move_without_replacing(place, path)
            sync(path.parent)
    except BaseException:
        for folder in made:  # the innermost first; a folder that holds something else stays
            remove_if_empty(folder)
        raise


def replace(path: Path, content: bytes | str) -> None:
    """Write a file that belongs to this run, in place of what it held before."""
    with _unfinished(path) as place, _naming(path, place):
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(place)
        place.replace(path)
        sync(path.parent)


def replace_json(path: Path, content: object) -> None:
    """Write a JSON file that belongs to this run, in place of what it held before."""
    replace(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} must be JSON: {error}") from error


def digest(path: Path) -> str:
    """Return a name for the content of a file.

    `hashlib.file_digest` does the same from Python 3.11 on.
    """
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            state.update(chunk)
    return state.hexdigest()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder, unless it holds something."""
    try:
        folder.rmdir()
    except OSError:
        return


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file that one process alone can hold. A process that is killed lets go of it.

    Raises:
        InputError: If another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Unlike those of `flock`, these locks do not pass to the processes that load the data,
        # which outlive a killed one for some seconds.
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError as error:
            held = error.errno in NO_LOCKS
            if held:
                print(f"Warning: {path} is on a disk without locks: let no second process use it.")
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if not held:
            raise InputError(f"another process holds {path}; wait for its end, or stop it")
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield a name that nobody else has, beside `path`, and remove what is left there."""
    prefix = f"{path.name[:100]}."
    try:
        folder = Path(mkdtemp(prefix=prefix, suffix=UNFINISHED, dir=path.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _naming(path: Path, place: Path) -> Iterator[None]:
    """Let errors of the disk name the file that was meant, and not the unfinished one."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = os_error_behind(error)
        if cause is None or cause.errno is None:
            raise
        if cause.filename is not None and str(place.parent) not in os.fsdecode(cause.filename):
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


def _move_without_replacing(place: Path, path: Path) -> None:
    if place.is_dir():
        refuse_existing([path])
        place.rename(path)
        return
    try:
        os.link(place, path)  # unlike a rename, it fails if the name is taken
    except FileExistsError:
        refuse_existing([path])
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        refuse_existing([path])  # a disk without links
        place.rename(path)
