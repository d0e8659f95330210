"""Callbacks that report a task's progress, and a helper that adds up step sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pop_base.errors import PopError, StoppedError

# Callback that receives the amount done and the total.
Progress = Callable[[int, int], object]
# Callback that receives each step's size.
Ran = Callable[[int], None]


def counting(total: int, on_progress: Progress) -> Ran:
    """Report 0 to `on_progress`. Return a function that adds up step sizes and reports the sum."""
    done = 0

    def ran(n: int) -> None:
        nonlocal done
        done += n
        on_progress(done, total)

    ran(0)
    return ran


class Unit(Enum):
    TOKENS = "tokens"
    BYTES = "bytes"


def _ignore(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class Watch:
    """Optional callbacks for a task.

    `on_stage(name, unit)` is called when a stage starts. `on_progress(done, total)` receives the
    stage's progress (both numbers are in `unit`). `on_note(text)` receives a note to show to the
    user. `on_warning(error)` receives each nonfatal error. Tasks call `should_stop` at each
    progress report and during llama.cpp's computations. If `should_stop` returns True, the task
    raises StoppedError and leaves no output. `may(question)` returns True if the user allows a
    download from a model hub. `refuses(question)` returns True if a user is present and declines a
    large catalog download.
    """

    on_stage: Callable[[str, Unit], object] = _ignore
    on_progress: Callable[[int, int], object] = _ignore
    on_note: Callable[[str], object] = _ignore
    on_warning: Callable[[PopError], object] = _ignore
    should_stop: Callable[[], bool] = _ignore
    may: Callable[[str], bool] = _ignore
    refuses: Callable[[str], bool] = _ignore

    def stage(self, name: str, unit: Unit = Unit.TOKENS) -> Progress:
        """Start a stage and return its progress callback, which may raise StoppedError."""
        self.on_stage(name, unit)
        return self._count

    def _count(self, done: int, total: int) -> None:
        self.on_progress(done, total)
        self.check_stop()

    def check_stop(self) -> None:
        """Raise StoppedError if the caller has requested a stop."""
        if self.should_stop():
            raise StoppedError
