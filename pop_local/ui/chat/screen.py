"""The chat's output: answers go to stdout, notes and errors to stderr."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TextIO

from rich.prompt import Prompt

from pop_base.errors import PopError
from pop_local.ui import error_output
from pop_local.ui.console import err, note, warn
from pop_local.ui.progress_bars import Advance, prefill_progress

# A terminal gets no control characters, which could move the cursor or change colors.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class AnswerWriter:
    """A writer for an answer's text. If the output is a terminal, removes control characters."""

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


class Screen:
    """The output of a chat: answers, notes, errors, and multiple-choice questions."""

    def __init__(self) -> None:
        self._answer: AnswerWriter | None = None

    def text(self, piece: str) -> None:
        self._answer = self._answer or AnswerWriter(sys.stdout)
        self._answer.push(piece)

    def end_answer(self) -> None:
        if self._answer is not None:
            self._answer.end()
        self._answer = None

    def note(self, line: str) -> None:
        note(line)

    def warn(self, line: str) -> None:
        warn(line)

    def error(self, error: PopError) -> None:
        error_output.show(error)

    def reading(self) -> AbstractContextManager[Advance]:
        """Show a progress bar that counts tokens during a prefill."""
        return prefill_progress("Reading the prompt")

    @property
    def is_typed(self) -> bool:
        """Return True if the input comes from a user who can answer questions."""
        return sys.stdin.isatty()

    def choose(self, question: str, choices: Mapping[str, str]) -> str | None:
        """Return the key that the user chooses, or None if the user cannot or does not choose.

        `choices` maps keys to descriptions. The last choice must be the one that does nothing. If
        only one choice exists, the user is not asked.
        """
        warn(question)
        if len(choices) == 1 or not self.is_typed:
            return None
        for key, words in choices.items():
            note(f"  {key}  {words}")
        try:
            return Prompt.ask(console=err, choices=[*choices])
        except (KeyboardInterrupt, EOFError):
            return None
