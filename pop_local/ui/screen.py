"""Where an answer goes: text on stdout, everything else on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from pop_converter.errors import PopError

from pop_local.engine.turn import Chunk
from pop_local.ui import errors
from pop_local.ui.progress import Advance, token_progress
from pop_local.ui.theme import note

# What a model writes must not move the cursor or recolour the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Screen(Protocol):
    """What the chat loop draws on."""

    def text(self, piece: str) -> None:
        """A piece of the answer."""

    def end_answer(self) -> None:
        """The answer is complete, or was cut off."""

    def note(self, line: str) -> None:
        """One line about what goes on."""

    def error(self, error: PopError) -> None:
        """What went wrong and what to do."""

    def reading(self) -> AbstractContextManager[Advance]:
        """Takes (done_tokens, total_tokens) while a prompt is read."""
        ...


def showing_prefill(screen: Screen, start: Callable[[Advance], Iterator[Chunk]]) -> Iterator[Chunk]:
    """The chunks of `start(on_prefill)`; until the first one the reading of the prompt is shown."""
    with screen.reading() as advance:
        chunks = start(advance)
        first = next(chunks, None)
    if first is not None:
        yield first
        yield from chunks


class TerminalScreen:
    """The real one; in a pipe the answers alone come out on stdout."""

    def __init__(self) -> None:
        self._last = ""

    def text(self, piece: str) -> None:
        if sys.stdout.isatty():
            piece = piece.translate(_CONTROLS)
        sys.stdout.write(piece)
        sys.stdout.flush()
        self._last = piece or self._last

    def end_answer(self) -> None:
        if not self._last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()

    def note(self, line: str) -> None:
        note(line)

    def error(self, error: PopError) -> None:
        errors.show(error)

    def reading(self) -> AbstractContextManager[Advance]:
        return token_progress("Reading the prompt")


def read_line() -> str:
    """A line typed at the prompt, or read from a pipe without one. Raises EOFError at the end."""
    if sys.stdin.isatty():
        return _typed()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _typed() -> str:
    if sys.stdout.isatty():
        _enable_line_editing()
        return input(PROMPT)
    # input() would put its prompt into the pipe.
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 (importing it is all that input() needs)
    except ImportError:  # Windows, where the console edits lines itself
        return


PROMPT = "> "
