"""Separation of a model's reasoning from its answer."""

from collections.abc import Iterator
from typing import Literal

from pop_local.engine.prompt.prompt import THINK
from pop_local.engine.tools.reader import Piece

END = "</think>"


class ThinkingSplitter:
    """Splits a streamed answer; only a block at its start is reasoning."""

    def __init__(self) -> None:
        self._held = ""
        self._at: Literal["beginning", "thought", "gap", "answer"] = "beginning"

    def push(self, text: str) -> Iterator[Piece]:
        self._held += text
        if self._at == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._at, self._held = "thought", begun.removeprefix(THINK)
            elif not THINK.startswith(begun):
                self._at = "answer"
        if self._at == "thought":
            thought, end, rest = self._held.partition(END)
            n_held = next(n for n in range(len(END) - 1, -1, -1) if thought.endswith(END[:n]))
            n_said = len(thought) - (0 if end else n_held)
            if n_said:
                yield Piece(reasoning=thought[:n_said])
            self._at, self._held = ("gap", rest) if end else ("thought", thought[n_said:])
        if self._at == "gap":
            self._held = self._held.lstrip()
            self._at = "answer" if self._held else "gap"
        if self._at == "answer" and self._held:
            yield Piece(self._held)
            self._held = ""

    def flush(self) -> Iterator[Piece]:
        """Yield the remaining text at the end of the answer."""
        if self._held:
            is_thought = self._at == "thought"
            yield Piece(reasoning=self._held) if is_thought else Piece(self._held)
        self._held = ""
