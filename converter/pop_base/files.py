"""Read files and pipes."""

import errno
import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pop_base.errors import PopError


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

    Raises PopError for a folder or a device.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a pipe"
        raise PopError(f"{path} is {kind}", "pass a file")
    with path.open("rb") as file:
        return file.read(most)
