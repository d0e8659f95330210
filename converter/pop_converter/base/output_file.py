"""Atomic writing: an output file is either complete or does not exist."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import psutil

from pop_converter.base.errors import OutputExistsError, WriteError

_SUFFIX = ".partial"


def check_output(dst: Path, sources: tuple[Path, ...], n_bytes: int, *, force: bool) -> None:
    """Raise OutputExistsError or WriteError if `dst` cannot or must not be written."""
    try:
        _check_name(dst, sources, force=force)
        TemporaryFile(dir=dst.parent).close()
        disk = shutil.disk_usage(dst.parent)
    except OSError as error:
        raise WriteError(f"cannot write {dst}: {error.strerror}", _hint(dst)) from error
    # Some network drives report neither their size nor their free space.
    if disk.total and disk.free < n_bytes:
        raise WriteError(
            f"the disk is too small: {dst} needs {n_bytes:,} bytes, {disk.free:,} are free",
            "free some space, or write to another disk",
        )


def _check_name(dst: Path, sources: tuple[Path, ...], *, force: bool) -> None:
    if not dst.parent.is_dir():
        raise WriteError(f"the folder {dst.parent} does not exist", "create it, or write elsewhere")
    if dst.is_dir():
        raise WriteError(f"{dst} is a folder", "name a file")
    if not dst.exists():
        return
    if any(dst.samefile(source) for source in sources):
        raise WriteError(f"the output {dst} is the input itself", "choose another name")
    if not force:
        raise _exists(f"{dst} exists")


@contextmanager
def replacing(dst: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `dst` if the block succeeds, and is removed otherwise.

    After a kill -9, the next call for `dst` removes the file. As with cp, the data may not be
    flushed to disk yet. Raises OutputExistsError if `dst` was created during the block and not
    `force`, WriteError for I/O errors such as a full disk.
    """
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}{_SUFFIX}")
    _remove_leftovers(dst)
    try:
        with temporary.open("x+b") as file:
            yield file
        if dst.exists() and not force:
            raise _exists(f"{dst} was created by another process")
        temporary.replace(dst)
    except OSError as error:
        raise WriteError(f"cannot write {dst}: {error.strerror}", _hint(dst)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700, whatever the umask.

    Existing folders stay unchanged. Raises OSError.
    """
    for missing in [one for one in (folder, *folder.parents) if not one.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)
        missing.chmod(0o700)


def _exists(message: str) -> OutputExistsError:
    hint = "choose another name, or replace it: force=True"
    return OutputExistsError(message, hint, cause="output-exists")


def _remove_leftovers(dst: Path) -> None:
    """Remove temporary files of dead processes; a living process may still be writing."""
    prefix = f".{dst.name}."
    with suppress(OSError):
        for path in list(dst.parent.iterdir()):
            if not (path.name.startswith(prefix) and path.name.endswith(_SUFFIX)):
                continue
            pid = path.name[len(prefix) : -len(_SUFFIX)]
            if pid.isdecimal() and not _is_other_process(int(pid)):
                with suppress(OSError):
                    path.unlink()


def _is_other_process(pid: int) -> bool:
    try:
        return pid != os.getpid() and psutil.pid_exists(pid)
    except OverflowError:
        return False


def _hint(dst: Path) -> str:
    return f"check the free space and the permissions of {dst.parent}"
