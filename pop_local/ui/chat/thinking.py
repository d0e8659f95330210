"""Splits the thoughts of a reasoning model from its answer."""

from collections.abc import Iterator
from dataclasses import dataclass

from pop_local.engine.prompt.prompt import THINK

END = "</think>"


@dataclass(frozen=True)
class Piece:
    """Some text, and whether it is a thought."""

    text: str
    is_thought: bool


class ThinkingSplitter:
    """Splits an answer that comes in pieces; only a block at its very beginning is thinking."""

    def __init__(self) -> None:
        self._held = ""
        self._step = self._at_the_beginning

    def push(self, text: str) -> Iterator[Piece]:
        self._held += text
        yield from self._step()

    def flush(self) -> Iterator[Piece]:
        """Return the text that was held back, at the end of the answer."""
        if self._held:
            yield Piece(self._held, is_thought=self._step == self._inside)
        self._held = ""

    def _at_the_beginning(self) -> Iterator[Piece]:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held = text.removeprefix(THINK)
            self._step = self._inside
            yield from self._inside()
        elif not THINK.startswith(text):
            self._step = self._after
            yield from self._after()

    def _inside(self) -> Iterator[Piece]:
        thought, end, rest = self._held.partition(END)
        if end:
            self._held = rest
            self._step = self._between
        else:
            n_held = next(n for n in range(len(END) - 1, -1, -1) if thought.endswith(END[:n]))
            thought, self._held = thought[: len(thought) - n_held], thought[len(thought) - n_held :]
        if thought:
            yield Piece(thought, is_thought=True)
        if end:
            yield from self._between()

    def _between(self) -> Iterator[Piece]:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._after
            yield from self._after()

    def _after(self) -> Iterator[Piece]:
        if self._held:
            yield Piece(self._held, is_thought=False)
        self._held = ""
