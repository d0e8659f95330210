"""An answer while it is written: Markdown in a terminal, the bare text elsewhere.

Finished blocks are printed for good. Only the last is drawn anew as it grows, and never more of it
than the screen holds. Nothing that has scrolled away is ever touched.
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

# A model must not move the cursor or recolour the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_INTERVAL_S = 0.05
# Drawing takes no more than a 75th of the time.
_REST = 74


class PlainAnswer:
    """The text as the model wrote it; control characters are kept from a terminal."""

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
    """The last lines on a terminal, drawn over and over; all above is printed for good."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []

    def draw(self, above: Lines, lines: Lines) -> None:
        """Put `above` and `lines` in place of the lines drawn last; `lines` may be replaced again.

        All goes to the terminal in one write, so nothing flickers.
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
        """Count the rows of a line, which a terminal wraps when it becomes narrower."""
        return max(1, -(-width // max(1, self._console.width)))


class MarkdownAnswer:
    """Rendered and highlighted; a reasoning model's thoughts are dim and plain."""

    def __init__(self, console: Console, code_theme: str) -> None:
        self._console = console
        self._code_theme = code_theme
        self._splitter = ThinkingSplitter()
        self._tail = Tail(console)
        self._pending = ""
        self._n_printed = 0  # lines of the pending block that are printed for good
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
        # A line that is not complete may still turn out to belong to the block before it.
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
            # The upper lines of code stay what they are: they need not wait for its end.
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
        """The blank line between two blocks."""
        return [[]] if self._has_blocks and not self._n_printed else []

    def _lines(self, block: str) -> Lines:
        if not self._n_printed:  # lines that are printed stay as wide as they were
            self._width = self._console.width
        return rendered(self._console, block, self._code_theme, self._width)


# Both take an answer piece by piece (`push`), and put the cursor on a new line at its `end`.
AnswerView = PlainAnswer | MarkdownAnswer


def _joined(blocks: Sequence[Lines]) -> Lines:
    joined: Lines = []
    for block in blocks:
        joined += [[], *block] if joined and block else block
    return joined
