"""Render streamed answers as Markdown in a terminal, and as plain text elsewhere.

Each finished Markdown block is printed once. The last block is redrawn while it grows, up to the
screen's height. Lines that have scrolled off the screen are never redrawn.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments
from rich.text import Text

from pop_local.engine.decode.text import n_begun
from pop_local.engine.prompt.prompt import THINK
from pop_local.engine.tools.reader import Piece
from pop_local.ui.chat.markdown import Lines, rendered, top_level

# Answers are shown without control characters, which could move the cursor or change colors.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_INTERVAL_S = 0.05
_THINK_END = "</think>"
# Pause between two redraws, as a multiple of the time one redraw takes.
_REST = 74


class PlainAnswer:
    """A plain-text writer for an answer. In a terminal, control characters are removed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._controls = _CONTROLS if stream.isatty() else {}
        self._last = ""

    def push(self, piece: str) -> None:
        piece = piece.translate(self._controls)
        self._stream.write(piece)
        self._stream.flush()
        self._last = piece or self._last

    def end(self) -> None:
        if not self._last.endswith("\n"):
            self._stream.write("\n")
            self._stream.flush()


class ThinkingSplitter:
    """A splitter of a streamed answer into reasoning (an initial <think> block) and content."""

    def __init__(self) -> None:
        self._held = ""
        self._at: Literal["beginning", "thought", "gap", "answer"] = "beginning"

    def push(self, text: str, *, is_last: bool = False) -> Iterator[Piece]:
        """Yield the next pieces, without an incomplete tag at the end unless `is_last` is set."""
        self._held += text
        if self._at == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._at, self._held = "thought", begun.removeprefix(THINK)
            elif is_last or not THINK.startswith(begun):
                self._at = "answer"
        if self._at == "thought":
            thought, end, rest = self._held.partition(_THINK_END)
            n_ready = len(thought) - (0 if end or is_last else n_begun(thought, _THINK_END))
            if n_ready:
                yield Piece(reasoning=thought[:n_ready])
            self._at, self._held = ("gap", rest) if end else ("thought", thought[n_ready:])
        if self._at == "gap":
            self._held = self._held.lstrip()
            self._at = "answer" if self._held else "gap"
        if self._at == "answer" and self._held:
            yield Piece(self._held)
            self._held = ""


class Tail:
    """The last lines of the terminal's output, which can be redrawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []

    def draw(self, above: Lines, lines: Lines) -> None:
        """Print `above` and `lines` over the previous call's `lines`."""
        # The terminal wraps lines that are wider than its window.
        n_columns = max(1, self._console.width)
        n_rows = sum(max(1, -(-width // n_columns)) for width in self._widths)
        with self._console:  # a single write avoids flicker
            if n_rows:
                up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
                self._console.control(Control(ControlType.CARRIAGE_RETURN, *up * n_rows))
            ended = chain.from_iterable([*line, Segment.line()] for line in [*above, *lines])
            self._console.print(Segments(ended), end="", crop=False)
        self._widths = [Segment.get_line_length(line) for line in lines]


class MarkdownAnswer:
    """A Markdown renderer for an answer. The model's reasoning is shown as dim plain text."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._splitter = ThinkingSplitter()
        self._tail = Tail(console)
        self._pending = ""
        self._has_blocks = False
        self._is_thinking = False
        self._next_draw_s = 0.0

    def push(self, piece: str) -> None:
        self._take(self._splitter.push(piece.translate(_CONTROLS)))
        started_s = time.monotonic()
        if self._pending and started_s >= self._next_draw_s:
            self._draw()
            now_s = time.monotonic()
            self._next_draw_s = now_s + max(_INTERVAL_S, _REST * (now_s - started_s))

    def end(self) -> None:
        self._take(self._splitter.push("", is_last=True))
        self._end_thinking()
        self._finish(top_level(self._pending))
        self._tail.draw([], [])
        self._pending = ""

    def _take(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.reasoning:
                self._is_thinking = True
                self._console.print(Text(piece.reasoning, "thinking"), end="", soft_wrap=True)
            else:
                self._end_thinking()
                self._pending += piece.content

    def _end_thinking(self) -> None:
        if self._is_thinking:
            self._console.print("\n")
        self._is_thinking = False

    def _draw(self) -> None:
        # An incomplete line may still belong to the preceding block.
        end = self._pending.rfind("\n") + 1
        *finished, last = top_level(self._pending[:end]) or [""]
        self._finish(finished)
        self._pending = last + self._pending[end:]
        n_visible = max(1, self._console.height - 2)
        self._tail.draw([], self._lines(top_level(self._pending))[-n_visible:])

    def _finish(self, blocks: list[str]) -> None:
        if lines := self._lines(blocks):
            self._tail.draw(lines, [])
            self._has_blocks = True

    def _lines(self, blocks: list[str]) -> Lines:
        """Return the blocks' lines, with a blank line between blocks."""
        found: Lines = []
        for block in blocks:
            lines = rendered(self._console, block)
            found += [[], *lines] if lines and (found or self._has_blocks) else lines
        return found
