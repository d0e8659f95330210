"""Read files and pipes. Reading from a pipe times out if no process writes to it."""

import errno
import mmap
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pop_base.errors import PopError

# Maximum time to wait for a pipe's writer.
_PATIENCE_S = 5.0


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file for reading. Raises OSError, for example if the file is empty.

    Requests that Linux cache the file in pages of 2 MiB. Decode is faster from such pages.
    """
    if path.is_file() and not path.stat().st_size:
        raise OSError(errno.ENODATA, "the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # the kernel may lack huge pages
                view.madvise(mmap.MADV_HUGEPAGE)
        yield view


def read_file(path: Path, most: int = -1) -> bytes:
    """Read up to `most` bytes from a file or pipe, or all bytes if `most` is -1. Raises OSError.

    Raises PopError for a folder, a device, or a pipe without a writer.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            return file.read(most)
    if not stat.S_ISFIFO(mode):
        if stat.S_ISDIR(mode):
            raise PopError(f"{path} is a folder", "pass a file")
        raise PopError(f"{path} is neither a file nor a pipe", "pass a file")
    # A blocking open would wait forever for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        begun = _first_of(path, pipe.fileno())
        os.set_blocking(pipe.fileno(), True)
        return begun + pipe.read(most if most < 0 else most - len(begun))


def _first_of(path: Path, pipe: int) -> bytes:
    """Wait until another process opens the pipe. Return the first byte, or b"" if none is ready."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            if begun := os.read(pipe, 1):
                return begun
        except BlockingIOError:
            return b""
        time.sleep(0.01)
    raise PopError(f"no process is writing to the pipe {path}", "pass a file")
