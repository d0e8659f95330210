"""Read texts from files and folders, balanced over kinds of files."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_local.texts.document_readers import read_text


def read_kinds(paths: Sequence[Path], most_chars: int) -> list[list[str]]:
    """Return each path's texts: a file's text, or one text per kind of file in a folder.

    Files of one kind share a top-level subfolder and a suffix. From each kind, about `most_chars`
    characters are read, from files in a fixed pseudorandom order. Binary files, duplicates and
    hidden files are skipped. Raises PopError for an unreadable path and for a path without new
    text.
    """
    seen: set[str] = set()
    found: list[list[str]] = []
    for path in paths:
        is_folder = path.is_dir()
        texts = _in_folder(path, most_chars, seen) if is_folder else _new(read_text(path), seen)
        found.append(texts)
        if not texts:
            raise PopError(
                f"{path} has no text, or only copies of earlier texts",
                "pass another file, or a folder of text files",
            )
    return found


def _in_folder(folder: Path, most_chars: int, seen: set[str]) -> list[str]:
    def kind(file: Path) -> tuple[str, str]:
        return "" if len(file.parts) == 1 else file.parts[0], file.suffix.lower()

    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    shown.sort(key=lambda file: (kind(file), _sha256(file.as_posix())))
    texts = []
    for _, group in groupby(shown, kind):
        parts: list[str] = []
        for file in group:
            with suppress(PopError):
                parts += _new(read_text(folder / file), seen)
            if sum(map(len, parts)) >= most_chars:
                break
        if parts:
            texts.append("\n\n".join(parts))
    return texts


def _new(text: str, seen: set[str]) -> list[str]:
    """Return the text in a list, or an empty list for a copy of an earlier text."""
    sha256 = _sha256(text)
    if sha256 in seen:
        return []
    seen.add(sha256)
    return [text]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
