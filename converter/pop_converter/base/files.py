"""Read files and pipes. Reading from a pipe times out if no process writes to it."""

import os
import stat
import time
from pathlib import Path

from pop_converter.base.errors import PopError

# Maximum time to wait for a pipe's writer.
_PATIENCE_S = 5.0


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
