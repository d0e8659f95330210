"""Plain text from bytes and files: UTF-8, or UTF-16 with a byte order mark."""

import codecs
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_converter.base.files import read_file

_HINT = "convert it to plain text first"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded(content: bytes, origin: str) -> str:
    """Decode a text. Raises PopError, naming `origin`, if it is not text."""
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{origin} is not UTF-8 text", _HINT) from error
    if "\0" in text:
        raise PopError(f"{origin} is a binary file, not text", _HINT)
    return text


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises PopError if it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise PopError(
            f"cannot read {path}: {error.strerror}", "give a text file that can be read"
        ) from error


def read_text(path: Path) -> str:
    """Read a text file. Raises PopError if it cannot be read, is not text or is empty."""
    text = decoded(read_bytes(path), str(path))
    if not text.strip():
        raise PopError(f"{path} has no text", "give a file with text")
    return text
