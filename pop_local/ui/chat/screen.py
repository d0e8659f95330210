"""The chat's output: answers go to stdout, notes and errors to stderr."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

from rich.prompt import Prompt

from pop_base.errors import PopError
from pop_local.ui import error_output
from pop_local.ui.console import err, note, warn
from pop_local.ui.progress_bars import Advance, prefill_progress

# A terminal gets no control characters, which could move the cursor or change colors.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Screen:
    """The output of a chat: answers, notes, errors, and multiple-choice questions."""

    def __init__(self) -> None:
        self._last = ""

    def text(self, piece: str) -> None:
        if sys.stdout.isatty():
            piece = piece.translate(_CONTROLS)
        sys.stdout.write(piece)
        sys.stdout.flush()
        self._last = piece or self._last

    def end_answer(self) -> None:
        if self._last and not self._last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._last = ""

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
