"""Decode text from bytes and files: UTF-8, or UTF-16 with a byte order mark."""

import codecs
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.base.files import read_file

_HINT = "convert the file to plain text first"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded(content: bytes, origin: str) -> str:
    """Decode `content`. Raises PopError, which names `origin`, if the bytes are not text."""
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{origin} is not UTF-8 text", _HINT) from error
    if "\0" in text:
        raise PopError(f"{origin} is a binary file, not text", _HINT)
    return text


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises PopError if reading fails."""
    try:
        return read_file(path)
    except OSError as error:
        raise PopError(
            f"cannot read {path}: {error.strerror}", "pass a readable text file"
        ) from error


def read_text(path: Path) -> str:
    """Read a text file. Raises PopError if it is unreadable, binary or empty."""
    text = decoded(read_bytes(path), str(path))
    if not text.strip():
        raise PopError(f"{path} has no text", "pass a file with text")
    return text
