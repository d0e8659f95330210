"""Read documents: plain text, mail, PDF and DOCX.

PDF and DOCX need the optional dependencies of the extra `documents`.
"""

import io
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pop_converter.base.errors import PopError
from pop_converter.base.files import read_file
from pop_local.texts.decoding import decoded, read_text

MAX_BYTES = 100_000_000
# Maximum growth of a DOCX when unpacked, since parsed XML needs twelve times as much memory.
_MAX_GROWTH_BYTES = 32_000_000
EXTRA_HINT = "install the reader: pip install 'pop-local[documents]'"


@dataclass(frozen=True)
class Document:
    """A file's text, or a part of the text, with a name for users."""

    name: str
    text: str


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a plain text, mail, PDF or DOCX file.

    Raises OSError if reading fails, and PopError if the file is binary, too large, or without text.
    """
    document = _read(Path(path))
    if not document.text.strip():
        raise PopError(
            f"{path} has no text", "pass a file with text, or run OCR on scanned pages first"
        )
    return document


def read_text_of(path: Path) -> str:
    """Return a document's text, without a size limit for plain text. Raises PopError."""
    if path.suffix.lower() not in _READERS:
        return read_text(path)
    try:
        # A PDF may contain lone surrogates.
        return read_document(path).text.encode(errors="replace").decode()
    except OSError as error:
        raise PopError(f"cannot read {path}: {error.strerror}", "pass a readable file") from error


def _read(path: Path) -> Document:
    content = _within_limit(read_file(path, MAX_BYTES + 1), str(path))
    # Session files must be valid Unicode.
    name = os.fsencode(path).decode(errors="replace")
    if path.suffix.lower() not in _READERS:
        return Document(name, decoded(content, str(path)))
    kind, library, text_of = _READERS[path.suffix.lower()]
    try:
        return Document(name, text_of(path, content))
    except (PopError, OSError):
        raise
    except ImportError as error:
        raise PopError(
            f"reading {path} requires {library}, which is not installed", EXTRA_HINT
        ) from error
    except Exception as error:  # on broken files, the libraries raise many types
        raise PopError(
            f"{path} cannot be read as {kind}: {error}", "save the file as plain text first"
        ) from error


def read_limited(file: BinaryIO, origin: str) -> bytes:
    """Read a file. Raises PopError beyond MAX_BYTES, before reading the rest."""
    return _within_limit(file.read(MAX_BYTES + 1), origin)


def _within_limit(content: bytes, origin: str) -> bytes:
    if len(content) > MAX_BYTES:
        raise PopError(
            f"{origin} is too large: it has more than {MAX_BYTES:,} bytes",
            "pass only a part of the file",
        )
    return content


def _too_much(path: Path) -> PopError:
    return PopError(f"{path} is too large when unpacked", "save the file as plain text first")


def _pdf(path: Path, content: bytes) -> str:
    import pypdf

    # pypdf's warnings are about harmless defects.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise PopError(
            f"{path} is protected by a password", "save the file without a password first"
        )
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
        raise PopError(f"{path} has a DTD, which DOCX forbids", "save the file as plain text first")
    blocks = document.iter_inner_content()
    texts = (_table(block) if hasattr(block, "rows") else block.text for block in blocks)
    return "\n\n".join(text for text in texts if text.strip())


def _mail(path: Path, content: bytes) -> str:
    import email.policy

    message = email.message_from_bytes(content, policy=email.policy.default)
    head = [f"{name}: {message[name]}" for name in ("From", "To", "Date", "Subject")]
    body = message.get_body(("plain", "html"))
    return "\n".join([*head, "", body.get_content() if body else ""])


def _table(table: Any) -> str:
    """Return a table's text. Unlike `row.cells`, do not repeat cells that span several columns."""
    rows = ([_cell(cell) for cell in row.tc_lst] for row in table._tbl.tr_lst)
    return "\n".join(" | ".join(cells) for cells in rows)


def _cell(cell: Any) -> str:
    return "\n".join(paragraph.text for paragraph in cell.p_lst)


_READERS = {
    ".pdf": ("PDF", "pypdf", _pdf),
    ".eml": ("mail", "", _mail),
    ".docx": ("DOCX", "python-docx", _docx),
}
