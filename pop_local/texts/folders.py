"""Read texts from files and folders, balanced over kinds of files."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_local.texts.document_readers import read_text_of


def read_kinds(paths: Sequence[Path], most_chars: int) -> list[list[str]]:
    """Return each path's texts: a file's text, or one text per kind of file in a folder.

    Files of one kind share a first-level folder and a suffix. For each kind, up to `most_chars`
    characters are read, from files in a fixed pseudorandom order. Binary files, duplicates and
    hidden files are skipped. Raises PopError for an unreadable path and for a path without new
    text.
    """
    seen: set[str] = set()
    found: list[list[str]] = []
    for path in paths:
        if path.is_dir():
            texts = _in_folder(path, most_chars, seen)
        else:
            texts = [*_new(read_text_of(path), seen)]
        found.append(texts)
        if not texts:
            raise PopError(
                f"{path} has no text, or only copies of earlier texts",
                "pass another file, or a folder of text files",
            )
    return found


def _in_folder(folder: Path, most_chars: int, seen: set[str]) -> list[str]:
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    shown.sort(key=lambda file: (_kind(file), _sha256(file.as_posix())))
    texts = [_joined(folder, kind, most_chars, seen) for _, kind in groupby(shown, _kind)]
    return [text for text in texts if text]


def _kind(file: Path) -> tuple[str, str]:
    return "" if len(file.parts) == 1 else file.parts[0], file.suffix.lower()


def _joined(folder: Path, files: Iterator[Path], most_chars: int, seen: set[str]) -> str:
    parts: list[str] = []
    for file in files:
        with suppress(PopError):
            parts += _new(read_text_of(folder / file), seen)
        if sum(map(len, parts)) >= most_chars:
            break
    return "\n\n".join(parts)


def _new(text: str, seen: set[str]) -> Iterator[str]:
    if (sha256 := _sha256(text)) not in seen:
        seen.add(sha256)
        yield text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
