"""Text to measure on: ours, which nothing is ever calibrated on, or the user's; and its windows."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from pop_converter.base.errors import PopError
from pop_local.engine.model import PopModel
from pop_local.texts.decoding import read_text

_HELDOUT = importlib.resources.files("pop_local") / "data" / "heldout"

TextTokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Text:
    """A text in parts that no window goes across, such as several kinds of text."""

    name: str
    parts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return sha256("".join(self.parts).encode()).hexdigest()


def shipped_text() -> Text:
    """Return prose, dialogue, code and tables, one part each."""
    names = sorted(f.name for f in _HELDOUT.iterdir() if f.name.endswith(".txt"))
    parts = tuple(shipped_part(name.removesuffix(".txt")) for name in names)
    return Text("held-out text of pop-local", parts)


def shipped_part(name: str) -> str:
    return (_HELDOUT / f"{name}.txt").read_text("utf-8")


def given_text(path: Path) -> Text:
    """Read a file as one part. Raises PopError when it cannot be read, is no text or holds none."""
    return Text(path.name, (read_text(path),))


def tokenize(model: PopModel, text: Text) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each part, without BOS."""
    return tuple(tuple(model.engine.context.tokenize(part)) for part in text.parts)


def room(texts: TextTokens, n_tokens: int) -> int:
    """Return how many windows of `n_tokens` `spread_windows` finds."""
    return sum(len(text) // n_tokens for text in texts)


def spread_windows(texts: TextTokens, n_windows: int, n_tokens: int) -> list[Sequence[int]]:
    """Return windows of `n_tokens` that do not overlap, spread evenly over all parts.

    They are spread within each part, too. Parts too short for their share leave it to the others.
    Raises PopError when the parts are too short for `n_windows`.
    """
    rooms = [len(text) // n_tokens for text in texts]
    if sum(rooms) < n_windows:
        raise PopError(
            f"the text has room for {sum(rooms)} windows of {n_tokens:,} tokens, {n_windows} are"
            f" wanted: at least {n_windows * n_tokens:,} tokens are needed, it has"
            f" {sum(len(text) for text in texts):,}",
            "give a longer text, fewer windows or shorter ones",
            cause="text-too-short",
        )
    return [
        text[start : start + n_tokens]
        for text, count in zip(texts, _shares(rooms, n_windows), strict=True)
        for start in np.linspace(0, len(text) - n_tokens, count).astype(int).tolist()
    ]


def _shares(room: list[int], n_windows: int) -> list[int]:
    """Share out windows as equally as room allows; the first parts get what does not divide."""
    shares = [0] * len(room)
    for _ in range(n_windows):
        open_parts = [part for part, limit in enumerate(room) if shares[part] < limit]
        shares[min(open_parts, key=lambda part: shares[part])] += 1
    return shares
