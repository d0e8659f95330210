"""Write files atomically so that an output file is never incomplete."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import psutil

from pop_base.errors import OutputExistsError, WriteError

_SUFFIX = ".partial"
WRITE_BYTES = 1 << 21


def check_output(dst: Path, sources: tuple[Path, ...], n_bytes: int, *, force: bool) -> None:
    """Raise OutputExistsError or WriteError if `dst` cannot be written or must not be replaced."""
    try:
        _check_name(dst, sources, force=force)
        TemporaryFile(dir=dst.parent).close()
        disk = shutil.disk_usage(dst.parent)
    except OSError as error:
        raise WriteError(f"cannot write {dst}: {error.strerror}", _hint(dst)) from error
    # Some network drives report a size of 0 and no free space.
    if disk.total and disk.free < n_bytes:
        raise WriteError(
            f"not enough disk space: {dst} needs {n_bytes:,} bytes, but only {disk.free:,} are"
            " free",
            "free up some space, or write to a different disk",
        )


def _check_name(dst: Path, sources: tuple[Path, ...], *, force: bool) -> None:
    if not dst.parent.is_dir():
        raise WriteError(
            f"the folder {dst.parent} does not exist", "create the folder, or choose another one"
        )
    if dst.is_dir():
        raise WriteError(f"{dst} is a folder", "choose a file name")
    if not dst.exists():
        return
    if any(dst.samefile(source) for source in sources):
        raise WriteError(f"the output file {dst} is also the input file", "choose a different name")
    if not force:
        raise _exists(f"{dst} exists")


class LargeWriter(io.BufferedRandom):
    """A file that buffers data and writes it in pieces that end at multiples of 2 MiB.

    Linux can then cache the file in pages of 2 MiB. Decode is faster from such pages.
    """

    def __init__(self, path: Path) -> None:
        """Create the file. Raises OSError, for example if the file exists."""
        super().__init__(path.open("x+b", buffering=0), WRITE_BYTES)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while len(left) >= (n_bytes := WRITE_BYTES - self.tell() % WRITE_BYTES):
            super().write(left[:n_bytes])
            self.flush()
            left = left[n_bytes:]
        super().write(left)
        return memoryview(data).nbytes


@contextmanager
def replacing(dst: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `dst` if the block succeeds.

    If the block raises an exception, the temporary file is removed. If the process is killed, the
    next call for `dst` removes the temporary file. The data is not synced to disk. Raises
    OutputExistsError if another process has created `dst` and `force` is false. Raises WriteError
    if an I/O error occurs.
    """
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}{_SUFFIX}")
    remove_leftovers(dst.parent, dst.name)
    try:
        with LargeWriter(temporary) as file:
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
    """Create a folder and its missing parents with mode 0700. Raises OSError."""
    for missing in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        missing.mkdir(mode=0o700, exist_ok=True)
        missing.chmod(0o700)  # mkdir applies the umask


def _exists(message: str) -> OutputExistsError:
    hint = "choose a different name, or pass force=True to replace the file"
    return OutputExistsError(message, hint, cause="output-exists")


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove temporary files left by ended processes. `name`: the output's name ("": any name)."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            stem, _, pid = path.name.removesuffix(_SUFFIX).rpartition(".")
            is_temporary = path.suffix == _SUFFIX and stem.startswith(".") and pid.isdecimal()
            if is_temporary and name in ("", stem[1:]) and not _is_other_process(int(pid)):
                with suppress(OSError):
                    path.unlink()


def _is_other_process(pid: int) -> bool:
    try:
        return pid != os.getpid() and psutil.pid_exists(pid)
    except OverflowError:
        return False


def _hint(dst: Path) -> str:
    return f"check the permissions of {dst.parent} and the free space on its disk"
