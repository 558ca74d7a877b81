"""What is written appears whole or not at all, and nothing that is there is changed."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetuning_runs import FINETUNING

from parts.errors import InputError, describe, plain_errors
from parts.files import appearing, locked, refuse_existing, replace, replace_json


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything in a folder: the contents of files, and None for folders and links."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_files_and_folders_appear_with_those_above_them(tmp_path: Path) -> None:
    with appearing(tmp_path / "a" / "b" / "file") as place:
        place.write_text("whole")
        assert not (tmp_path / "a" / "b" / "file").exists()
    with appearing(tmp_path / "folder") as place:
        (place / "inside").mkdir(parents=True)
        (place / "inside" / "file").write_text("whole")
    (tmp_path / "empty").mkdir()
    with appearing(tmp_path / "empty") as place:  # a folder that the user made for it
        place.mkdir()
        (place / "file").write_text("whole")
    assert {name for name, content in tree(tmp_path).items() if content == b"whole"} == {
        "a/b/file",
        "folder/inside/file",
        "empty/file",
    }
    assert len(tree(tmp_path)) == 3 + 5


def write_half(path: Path, kind: str, error: type[BaseException]) -> None:
    with appearing(path) as place:
        make_ours(place, kind)
        raise error


def make_ours(place: Path, kind: str) -> None:
    if kind == "file":
        place.write_text("ours")
    else:
        place.mkdir()
        (place / "file").write_text("ours")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_of_what_failed(
    kind: str, error: type[BaseException], tmp_path: Path
) -> None:
    for path in (tmp_path / "name", tmp_path / "new" / "folder" / "name"):
        with pytest.raises(error):
            write_half(path, kind, error)
    assert tree(tmp_path) == {}


def file(path: Path) -> None:
    path.write_text("theirs")


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("theirs")


def link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [file, full_folder, link])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_never_replaced(
    make: Callable[[Path], None], when: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "name"
    if when == "before":
        make(path)

    def write() -> None:
        with appearing(path) as place:
            make_ours(place, kind)
            make(path)

    with pytest.raises(InputError, match="name exists; nothing is written over it"):
        write()
    found = tree(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    make(path)
    assert found == tree(tmp_path)


def test_existing_files_are_counted(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths[1:]:
        path.touch()
    with pytest.raises(InputError, match=r"b exists, and 1 more; nothing is written over it"):
        refuse_existing(paths)
    refuse_existing(paths[:1])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {finetuning!r})
from parts.files import appearing, replace
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{strike}
with appearing(Path("new") / "folder") as place:
    place.mkdir()
    (place / "file").write_text("whole")
    {inside}
replace(Path("own"), "new")
"""
STRIKES = {
    "in the block": ("", "kill()", set()),
    "before the rename": ("Path.rename = kill", "", set()),
    "after the rename": (
        "import parts.files; f = parts.files.sync; parts.files.sync = "
        "lambda p: kill() if Path('new/folder').exists() else f(p)",
        "",
        {"new/folder/file"},
    ),
    "before the replacement": ("Path.replace = kill", "", {"new/folder/file"}),
}


@pytest.mark.parametrize("strike", STRIKES)
def test_killed_while_writing(strike: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("old")
    before, inside, expected = STRIKES[strike]
    code = KILLED.format(finetuning=str(FINETUNING), strike=before, inside=inside or "pass")
    process = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert (tmp_path / "own").read_text() == "old"
    whole = {name for name, content in tree(tmp_path).items() if content == b"whole"}
    assert {name for name in whole if "unfinished" not in name} == expected
    # What is left blocks nothing.
    if not expected:
        with appearing(tmp_path / "new" / "folder") as place:
            full_folder(place)


def hold(path: Path) -> int:
    """Return the exit status of another process that holds a file, or tries to."""
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
    code += "from parts.files import locked\nwith locked(Path(sys.argv[2])): pass"
    done = subprocess.run([sys.executable, "-c", code, FINETUNING, path], check=False)
    return done.returncode


def test_one_process_holds_a_file(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        assert hold(tmp_path / "lock") == 1
    assert hold(tmp_path / "lock") == 0


def test_a_disk_without_locks_is_told_of(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with locked(tmp_path / "lock"):
        assert "on a disk without locks" in capsys.readouterr().out


def test_a_lock_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch) -> None:
    """Its name may be that of another file by now, which another process holds."""
    lockf = fcntl.lockf
    monkeypatch.setattr(
        fcntl, "lockf", lambda *given: (lockf(*given), (tmp_path / "lock").unlink())
    )
    with pytest.raises(InputError, match="another process holds"), locked(tmp_path / "lock"):
        pass


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {finetuning!r})
from parts.errors import plain_errors
from parts.files import appearing, replace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk: so far and no further
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with plain_errors():
    {write}
"""
WRITES = {
    "bytes": "place.write_bytes(bytes(2000))",
    "torch, a file": """import torch
        with place.open('wb') as file:
            torch.save(torch.ones(999), file)""",
    "safetensors": "import torch; from safetensors.torch import save_file; "
    "save_file({'a': torch.ones(999)}, place)",
    "a picture": "import numpy as np; from PIL import Image; Image.fromarray("
    "np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(place, 'PNG')",
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_one_line_that_names_the_file(write: str, tmp_path: Path) -> None:
    code = f"with appearing(Path('new/file')) as place:\n        {WRITES[write]}"
    process = subprocess.run(
        [sys.executable, "-c", LIMITED.format(finetuning=str(FINETUNING), write=code)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    reason = os.strerror(errno.EFBIG)
    assert process.stderr == (
        f"error: new/file: {reason} (files on that disk may not be so large)\n"
    )
    assert tree(tmp_path) == {}


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch) -> None:
    replace_json(tmp_path / "own.json", {"a": 1})

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="own"):
        replace(tmp_path / "own.json", "other")
    assert tree(tmp_path) == {"own.json": b'{\n  "a": 1\n}\n'}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space on that disk"),
        (errno.EROFS, "choose a place that may be written"),
        (errno.EACCES, "choose a place that may be read and written"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EIO, ""),
    ],
)
def test_errors_of_the_system_are_one_line_with_a_remedy(number: int, remedy: str, capsys) -> None:
    expected = f"runs/a: {os.strerror(number)}" + (f" ({remedy})" if remedy else "")
    assert describe(OSError(number, os.strerror(number), "runs/a")) == expected
    with pytest.raises(SystemExit) as exit_info, plain_errors():
        raise OSError(number, os.strerror(number), "runs/a")
    assert exit_info.value.code == f"error: {expected}"


def test_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors():
        raise ZeroDivisionError


def test_one_of_several_processes_speaks(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_info, plain_errors():
        raise InputError("wrong")
    assert exit_info.value.code == 1
