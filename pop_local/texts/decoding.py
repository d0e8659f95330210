"""Plain text out of bytes and files: UTF-8, or what a byte order mark says."""

import codecs
import os
import stat
import time
from pathlib import Path

from converter.errors import PopError

# How long a pipe may be without anybody who writes to it.
_PATIENCE_S = 5.0
_HINT = "convert it to plain text first"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded(content: bytes, origin: str) -> str:
    """Decode a text. Raises PopError, naming `origin`, for what is no text."""
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{origin} is not UTF-8 text", _HINT) from error
    if "\0" in text:
        raise PopError(f"{origin} is a binary file, not text", _HINT)
    return text


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
        raise PopError(f"{path} is neither a file nor a pipe", "give a file")
    # Opened as files are, it would wait for a writer for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        begun = _first_of(path, pipe.fileno())
        os.set_blocking(pipe.fileno(), True)
        return begun + pipe.read(most if most < 0 else most - len(begun))


def _first_of(path: Path, pipe: int) -> bytes:
    """What a pipe has now, or b"" once somebody writes to it."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            if begun := os.read(pipe, 1):
                return begun
        except BlockingIOError:
            return b""
        time.sleep(0.01)
    raise PopError(f"nobody writes to the pipe {path}", "give a file")


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises PopError when it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise PopError(
            f"cannot read {path}: {error.strerror}", "give a text file that can be read"
        ) from error


def read_text(path: Path) -> str:
    """Read a whole text. Raises PopError when it cannot be read, is no text or holds none."""
    text = decoded(read_bytes(path), str(path))
    if not text.strip():
        raise PopError(f"{path} holds no text", "give a file with text in it")
    return text
