"""What is wrong outside of the program, told in one line and without a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some space on that disk",
    errno.EFBIG: "files on that disk may not be so large",
    errno.EACCES: "choose a place that may be read and written",
    errno.EPERM: "choose a place that may be read and written",
    errno.EROFS: "choose a place that may be written",
    errno.ENOENT: "does it exist?",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.EEXIST: "name another",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class InputError(ValueError):
    """What the user gave is wrong; the message says what was found and what to do."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one line if the user's input, a file or the disk is at fault.

    Any other exception is a fault of the program and keeps its traceback. Of several processes only
    the first one speaks.
    """
    # In a locale without UTF-8, characters that it lacks are written as escapes.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, OSError) as error:
        message = describe(error) if isinstance(error, OSError) else str(error)
        sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def describe(error: OSError) -> str:
    """Return what the operating system complains of, about which file, and what to do."""
    if error.errno is None:
        return first_line(error)
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + (f" ({remedy})" if remedy else "")


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def os_error_behind(error: BaseException) -> OSError | None:
    """Return the error of the operating system that another library's error hides, if it does.

    PyTorch raises a `RuntimeError` while it handles one, and safetensors writes its number into a
    message.
    """
    if isinstance(error, OSError):
        return error
    if isinstance(error.__context__, OSError):
        return error.__context__
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
