"""Connect a workflow's Watch to the terminal: progress bars, notes, questions, and Ctrl-C."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import typer

from pop_base.errors import PopError
from pop_base.progress import Unit, Watch
from pop_local.ui.console import note, warn
from pop_local.ui.ctrl_c import CtrlC, deferred_interrupt
from pop_local.ui.hints import hint_of
from pop_local.ui.progress_bars import Advance, stage_progress


def asked(question: str) -> bool:
    """Ask the user a yes-or-no question. Return False if there is no terminal."""
    return sys.stdin.isatty() and typer.confirm(question, default=True, err=True)


class _Stages:
    """Progress bars for stages. A bar is cleared before a note is printed or a new stage starts."""

    def __init__(self, interrupt: CtrlC) -> None:
        self._interrupt = interrupt
        self._stack = ExitStack()
        self._stage = ("", Unit.TOKENS)
        self._bar: Advance | None = None

    def begin(self, name: str, unit: Unit) -> None:
        self.end()
        self._stage = (name, unit)

    def advance(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(stage_progress(*self._stage))
        self._bar(done, total)

    def end(self) -> None:
        self._stack.close()
        self._bar = None

    def tell(self, text: str) -> None:
        self.end()
        note(text)

    def ask(self, question: str) -> bool:
        self.end()
        self._interrupt.at_once = True
        try:
            return asked(question)
        finally:
            self._interrupt.at_once = False

    def refuses(self, question: str) -> bool:
        return sys.stdin.isatty() and not self.ask(question)

    def warn(self, error: PopError) -> None:
        self.end()
        warn(f"Warning: {'; '.join(filter(None, [error.message, hint_of(error)]))}.")


@contextmanager
def terminal_watch(interrupt: CtrlC | None = None) -> Iterator[Watch]:
    """Show a workflow's progress. Ctrl-C raises KeyboardInterrupt unless `interrupt` defers it."""
    stages = _Stages(interrupt or CtrlC())
    try:
        yield Watch(
            stages.begin,
            stages.advance,
            stages.tell,
            stages.warn,
            may=stages.ask,
            refuses=stages.refuses,
        )
    finally:
        stages.end()


@contextmanager
def stoppable_watch() -> Iterator[Watch]:
    """Yield a `terminal_watch` whose `should_stop` returns True after the first Ctrl-C."""
    with deferred_interrupt() as interrupt, terminal_watch(interrupt) as watch:
        yield replace(watch, should_stop=lambda: interrupt.asked)
