"""The chat's output: answers go to stdout, notes and errors to stderr."""

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

from pop_converter.base.errors import PopError
from pop_local.ui import error_output
from pop_local.ui.chat.live_answer import MarkdownAnswer, PlainAnswer
from pop_local.ui.console import note, out, warn
from pop_local.ui.progress_bars import Advance, prefill_progress


class Screen:
    """A chat's output of answers, notes and errors, and its multiple-choice questions."""

    def __init__(self) -> None:
        self._answer: PlainAnswer | MarkdownAnswer | None = None

    def text(self, piece: str) -> None:
        if self._answer is None:
            is_plain = os.environ.get("NO_COLOR") or out.is_dumb_terminal or not out.is_terminal
            self._answer = PlainAnswer(sys.stdout) if is_plain else MarkdownAnswer(out)
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

    def reading(self, what: str = "Reading the prompt") -> AbstractContextManager[Advance]:
        """Show a progress bar that counts tokens during a prefill or refill."""
        return prefill_progress(what)

    @property
    def is_typed(self) -> bool:
        """Return True if the user types the input and can answer questions."""
        return sys.stdin.isatty()

    def choose(self, question: str, choices: Mapping[str, str], enter: str = "") -> str | None:
        """Return the key that the user chooses, or None if there is no choice or no terminal.

        `choices` maps keys to descriptions. The last choice must have no effect, since the user is
        not asked if no other choice exists. `enter`: the key that an empty line chooses, if any.
        """
        warn(question)
        if len(choices) == 1 or not self.is_typed:
            return None
        for key, words in choices.items():
            note(f"  {key}  {words}")
        from pop_local.ui.chat.line import chosen_key

        return chosen_key([*choices], enter)
