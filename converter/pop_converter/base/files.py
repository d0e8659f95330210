"""Read a file or a pipe by path."""

import stat
from pathlib import Path

from pop_converter.base.errors import PopError


def read_file(path: Path, most: int = -1) -> bytes:
    """Read up to `most` bytes from a file or pipe, or all bytes if `most` is -1. Raises OSError.

    Raises PopError for a folder or a device.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise PopError(f"{path} is a folder", "pass a file")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise PopError(f"{path} is neither a file nor a pipe", "pass a file")
    with path.open("rb") as file:
        return file.read(most)
