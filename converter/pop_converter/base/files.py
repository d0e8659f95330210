"""Files and pipes that are given by name: what nobody writes to is not waited for."""

import os
import stat
import time
from pathlib import Path

from pop_converter.base.errors import PopError

# How long a pipe may be without anybody who writes to it.
_PATIENCE_S = 5.0


def read_file(path: Path, most: int = -1) -> bytes:
    """Read a file, or a pipe that somebody writes to, up to `most` bytes (-1: all).

    Raises OSError when it cannot be read, and PopError for a folder, a device, and a pipe to which
    nobody begins to write within seconds.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            return file.read(most)
    if not stat.S_ISFIFO(mode):
        found = "is a folder" if stat.S_ISDIR(mode) else "is neither a file nor a pipe"
        raise PopError(f"{path} {found}", "give a file")
    # Opened as files are, it would wait for a writer for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        begun = _first_of(path, pipe.fileno())
        os.set_blocking(pipe.fileno(), True)
        return begun + pipe.read(most if most < 0 else most - len(begun))


def _first_of(path: Path, pipe: int) -> bytes:
    """Return the bytes that a pipe has now, or b"" once somebody writes to it."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            if begun := os.read(pipe, 1):
                return begun
        except BlockingIOError:
            return b""
        time.sleep(0.01)
    raise PopError(f"nobody writes to the pipe {path}", "give a file")
