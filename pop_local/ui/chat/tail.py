"""The last lines on a terminal, which are drawn over and over."""

from itertools import chain

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType, Segment, Segments

from pop_local.ui.chat.markdown import Lines


class Tail:
    """Everything above it is printed for good."""

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
