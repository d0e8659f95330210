"""Rendering of streamed answers: Markdown in a terminal, plain text elsewhere.

Finished blocks are printed once. Only the last block is redrawn while it grows, up to the screen's
height. Lines that scrolled away never change.
"""

import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments
from rich.text import Text

from pop_local.engine.tools.reader import Piece
from pop_local.ui.chat.markdown import Lines, is_code, rendered, top_level
from pop_local.ui.chat.thinking import ThinkingSplitter

# Keep a model from moving the cursor or changing colours.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_INTERVAL_S = 0.05
# Limits drawing to 1/75 of the time.
_REST = 74


class PlainAnswer:
    """Writes the model's text unchanged, except for control characters in a terminal."""

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


class Tail:
    """The last lines on a terminal, which are redrawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []

    def draw(self, above: Lines, lines: Lines) -> None:
        """Replace the lines drawn last with `above` and `lines`; a next call replaces `lines`.

        One write to the terminal avoids flicker.
        """
        n_rows = sum(map(self._n_rows, self._widths))
        with self._console:
            if n_rows:
                up = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
                self._console.control(Control(ControlType.CARRIAGE_RETURN, *up * n_rows))
            ended = chain.from_iterable([*line, Segment.line()] for line in [*above, *lines])
            self._console.print(Segments(ended), end="", crop=False)
        self._widths = [Segment.get_line_length(line) for line in lines]

    def _n_rows(self, width: int) -> int:
        """Count the rows of a line, which a narrower terminal wraps."""
        return max(1, -(-width // max(1, self._console.width)))


class MarkdownAnswer:
    """Renders Markdown with highlighting; the model's reasoning is dim and plain."""

    def __init__(self, console: Console, code_theme: str) -> None:
        self._console = console
        self._code_theme = code_theme
        self._splitter = ThinkingSplitter()
        self._tail = Tail(console)
        self._pending = ""
        self._n_printed = 0  # final lines of the pending block
        self._width = console.width
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
        self._take(self._splitter.flush())
        self._end_thinking()
        for block in top_level(self._pending):
            self._finish(block)
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
        for block in finished:
            self._finish(block)
        self._pending = last + self._pending[end:]
        self._draw_pending()

    def _draw_pending(self) -> None:
        blocks = [self._lines(block) for block in top_level(self._pending)]
        lines = _joined(blocks)[self._n_printed :]
        n_visible = max(1, self._console.height - 2)
        n_over = len(lines) - n_visible
        lead = self._lead()
        if n_over > 0 and is_code(self._pending):
            # Later code does not change the upper lines.
            n_done = min(len(lines) - 2, n_over + n_visible // 2)
            self._tail.draw(lead + lines[:n_done], lines[n_done:])
            self._n_printed += n_done
            self._has_blocks = True
        else:
            self._tail.draw([], (lead + lines)[-n_visible:])

    def _finish(self, block: str) -> None:
        lines = self._lines(block)
        if lines:
            self._tail.draw(self._lead() + lines[self._n_printed :], [])
            self._has_blocks = True
        self._n_printed = 0

    def _lead(self) -> Lines:
        """Return the blank line between two blocks."""
        return [[]] if self._has_blocks and not self._n_printed else []

    def _lines(self, block: str) -> Lines:
        if not self._n_printed:  # printed lines keep their width
            self._width = self._console.width
        return rendered(self._console, block, self._code_theme, self._width)


# Both receive an answer in pieces (`push`) and finish the line at its `end`.
AnswerView = PlainAnswer | MarkdownAnswer


def _joined(blocks: Sequence[Lines]) -> Lines:
    joined: Lines = []
    for block in blocks:
        joined += [[], *block] if joined and block else block
    return joined
