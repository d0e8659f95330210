"""Writing a file that is either whole and in its place, or not there at all."""

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
    """Refuse an output that cannot or must not be written, before anything is read in full.

    Raises OutputExistsError, WriteError.
    """
    try:
        _check_name(dst, sources, force=force)
        TemporaryFile(dir=dst.parent).close()
        disk = shutil.disk_usage(dst.parent)
    except OSError as error:
        raise WriteError(f"cannot write {dst}: {error.strerror}", _hint(dst)) from error
    # Some network drives tell neither their size nor what is left.
    if disk.total and disk.free < n_bytes:
        raise WriteError(
            f"{dst} needs {n_bytes:,} bytes and its disk has {disk.free:,} left",
            "free some space, or write to another disk",
        )


def _check_name(dst: Path, sources: tuple[Path, ...], *, force: bool) -> None:
    if not dst.parent.is_dir():
        raise WriteError(f"there is no folder {dst.parent}", "create it, or write elsewhere")
    if dst.is_dir():
        raise WriteError(f"{dst} is a folder", "give the name of a file")
    if not dst.exists():
        return
    if any(dst.samefile(source) for source in sources):
        raise WriteError(f"the output {dst} is the input itself", "give another name")
    if not force:
        raise _exists(f"{dst} exists")


@contextmanager
def replacing(dst: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Open a new file beside `dst`, which takes its place when the block ends well.

    Whatever goes wrong, it is removed; after a kill -9 the next call for `dst` removes it, once its
    process is gone. As with cp, the data may still be on its way to the disk: the source is there
    as long as one keeps it. Raises OutputExistsError when `dst` appeared meanwhile and not `force`,
    and WriteError for what the machine refuses, a full disk among it.
    """
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}{_SUFFIX}")
    _remove_leftovers(dst)
    try:
        with temporary.open("x+b") as file:
            yield file
        if dst.exists() and not force:
            raise _exists(f"{dst} appeared meanwhile")
        temporary.replace(dst)
    except OSError as error:
        raise WriteError(f"cannot write {dst}: {error.strerror}", _hint(dst)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for its owner only, whatever the umask.

    One that is there stays as it is. Raises OSError.
    """
    for missing in [one for one in (folder, *folder.parents) if not one.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)
        missing.chmod(0o700)


def _exists(message: str) -> OutputExistsError:
    hint = "choose another name, or replace it: force=True"
    return OutputExistsError(message, hint, cause="output-exists")


def _remove_leftovers(dst: Path) -> None:
    """Remove what dead processes have left; a living one is still writing."""
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
