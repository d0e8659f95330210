"""Read documents: plain text (UTF-8, or UTF-16 with a byte order mark), PDF, and DOCX.

PDF and DOCX require the optional dependencies in the `documents` extra.
"""

import codecs
import io
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pop_base.errors import PopError
from pop_base.files import read_file

MAX_BYTES = 100_000_000
# The maximum growth of a DOCX when unpacked, since parsed XML takes twelve times as much memory.
_MAX_GROWTH_BYTES = 32_000_000
EXTRA_HINT = "run pip install 'pop-local[documents]'"
_PLAIN_HINT = "save the file as plain text first"
_TEXT_HINT = "convert the file to plain text first"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Document:
    """All or part of a file's text, with a name to show the user."""

    name: str
    text: str


def decoded(content: bytes, origin: str) -> str:
    """Decode `content`. If `content` is not text, raises a PopError that names `origin`."""
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{origin} is not UTF-8 text", _TEXT_HINT) from error
    if "\0" in text:
        raise PopError(f"{origin} is a binary file, not text", _TEXT_HINT)
    return text


def read_text(path: Path) -> str:
    """Return a document's text. Plain-text files may be any size. Raises PopError."""
    try:
        if path.suffix.lower() in _READERS:
            # A PDF may contain lone surrogates.
            return read_document(path).text.encode(errors="replace").decode()
        text = decoded(read_file(path), str(path))
    except OSError as error:
        raise PopError(f"cannot read {path}: {error.strerror}", "pass a readable file") from error
    if not text.strip():
        raise PopError(f"{path} contains no text", "pass a file that contains text")
    return text


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a plain-text, PDF, or DOCX file.

    Raises OSError if reading fails, and PopError if the file is binary, too large, or empty.
    """
    path = Path(path)
    content = _within_limit(read_file(path, MAX_BYTES + 1), str(path))
    kind, library, text_of = _READERS.get(path.suffix.lower(), ("text", "", None))
    try:
        text = text_of(path, content) if text_of else decoded(content, str(path))
    except (PopError, OSError):
        raise
    except ImportError as error:
        raise PopError(
            f"reading {path} requires {library}, which is not installed", EXTRA_HINT
        ) from error
    except MemoryError as error:
        raise PopError(f"reading {path} needs too much memory", _PLAIN_HINT) from error
    except Exception as error:  # the libraries raise many types for broken files
        reason = str(error) or type(error).__name__
        raise PopError(f"{path} cannot be read as {kind}: {reason}", _PLAIN_HINT) from error
    if not text.strip():
        raise PopError(
            f"{path} contains no text", "pass a file that contains text, or run OCR on it first"
        )
    # Session files must be valid Unicode.
    return Document(os.fsencode(path).decode(errors="replace"), text)


def read_limited(file: BinaryIO, origin: str) -> bytes:
    """Read a file. Raises PopError if the file exceeds MAX_BYTES bytes."""
    return _within_limit(file.read(MAX_BYTES + 1), origin)


def _within_limit(content: bytes, origin: str) -> bytes:
    if len(content) > MAX_BYTES:
        raise PopError(
            f"{origin} is too large: the limit is {MAX_BYTES:,} bytes", "pass only part of the file"
        )
    return content


def _too_much(path: Path) -> PopError:
    return PopError(f"{path} is too large when decompressed", _PLAIN_HINT)


def _pdf(path: Path, content: bytes) -> str:
    import pypdf

    # pypdf's warnings are about harmless defects.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise PopError(f"{path} is password-protected", "save the file without a password first")
    texts, n_chars = [], 0
    for page in reader.pages:
        texts.append(page.extract_text())
        n_chars += len(texts[-1])
        if n_chars > MAX_BYTES:  # pages may share content
            raise _too_much(path)
    return "\n\n".join(texts)


def _docx(path: Path, content: bytes) -> str:
    import docx

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        n_bytes = sum(member.file_size for member in archive.infolist())
    if n_bytes > len(content) + _MAX_GROWTH_BYTES:
        raise _too_much(path)
    document = docx.Document(io.BytesIO(content))
    if document.element.getroottree().docinfo.internalDTD is not None:
        # python-docx would drop the text of entities.
        raise PopError(f"{path} contains a DTD, which DOCX forbids", _PLAIN_HINT)
    blocks = document.iter_inner_content()
    texts = (_table(block) if hasattr(block, "rows") else block.text for block in blocks)
    return "\n\n".join(text for text in texts if text.strip())


def _table(table: Any) -> str:
    """Return a table's text. A cell that spans several columns appears only once."""
    rows = []
    for row in table._tbl.tr_lst:
        cells = ["\n".join(paragraph.text for paragraph in cell.p_lst) for cell in row.tc_lst]
        rows.append(" | ".join(cells))
    return "\n".join(rows)


_READERS = {
    ".pdf": ("PDF", "pypdf", _pdf),
    ".docx": ("DOCX", "python-docx", _docx),
}
