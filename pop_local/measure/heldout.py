"""Windows of held-out text: the user's own text, or bundled text that is never used for fits."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pop_base.errors import PopError
from pop_local.engine.model import PopModel
from pop_local.texts.document_readers import read_text

_HELDOUT = importlib.resources.files("pop_local") / "data" / "heldout"

TextTokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Text:
    """Text split into parts, such as prose and code.

    No window contains tokens from two parts.
    """

    name: str
    parts: tuple[str, ...]


def shipped_text() -> Text:
    """Return the shipped held-out text, in four parts: prose, dialogue, code, and tables."""
    names = sorted(f.name for f in _HELDOUT.iterdir() if f.name.endswith(".txt"))
    parts = tuple(shipped_part(name.removesuffix(".txt")) for name in names)
    return Text("pop-local's held-out text", parts)


def shipped_part(name: str) -> str:
    return (_HELDOUT / f"{name}.txt").read_text("utf-8")


def given_text(path: Path) -> Text:
    """Read a file as a single part. Raises PopError if the file is unreadable, binary, or empty."""
    return Text(path.name, (read_text(path),))


def tokenize(model: PopModel, text: Text) -> tuple[tuple[int, ...], ...]:
    """Return each part's tokens, without BOS."""
    return tuple(tuple(model.engine.context.vocabulary.tokenize(part)) for part in text.parts)


def room(texts: TextTokens, n_tokens: int) -> int:
    """Return the number of windows of `n_tokens` tokens that fit in the parts."""
    return sum(len(text) // n_tokens for text in texts)


def spread_windows(texts: TextTokens, n_windows: int, n_tokens: int) -> list[Sequence[int]]:
    """Return non-overlapping windows of `n_tokens` tokens, spread evenly over all parts.

    Longer parts make up for parts that are too short. Raises PopError if the text is too short.
    """
    rooms = [len(text) // n_tokens for text in texts]
    if sum(rooms) < n_windows:
        raise PopError(
            f"the text is too short for {n_windows} windows of {n_tokens:,} tokens: only"
            f" {sum(rooms)} fit",
            "use longer text, fewer windows, or shorter windows",
            cause="text-too-short",
        )
    return [
        text[start : start + n_tokens]
        for text, count in zip(texts, _shares(rooms, n_windows), strict=True)
        for start in np.linspace(0, len(text) - n_tokens, count).astype(int).tolist()
    ]


def _shares(room: list[int], n_windows: int) -> list[int]:
    """Distribute windows evenly among the parts. Any remainder goes to the first parts."""
    shares = [0] * len(room)
    for _ in range(n_windows):
        open_parts = [part for part, limit in enumerate(room) if shares[part] < limit]
        shares[min(open_parts, key=lambda part: shares[part])] += 1
    return shares
