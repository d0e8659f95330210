"""How work tells what it does: to whoever called, without knowing who that is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pop_local.base.errors import PopError, StoppedError
from pop_local.base.progress import Progress


class Unit(Enum):
    """The unit that a stage counts in."""

    TOKENS = "tokens"
    BYTES = "bytes"


def _ignore(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class Watch:
    """Who follows a workflow, and who may end it; all of it may be left out.

    `on_stage(name, unit)` begins a stage, `on_progress(done, total)` counts in its unit.
    `on_note(text)` gets what is worth knowing, `on_warning(error)` what is let through and might
    have been refused. A workflow asks `should_stop` as often as it counts, and while llama.cpp
    reads; it then raises StoppedError and leaves nothing behind. `may(question)` allows a download.
    """

    on_stage: Callable[[str, Unit], object] = _ignore
    on_progress: Callable[[int, int], object] = _ignore
    on_note: Callable[[str], object] = _ignore
    on_warning: Callable[[PopError], object] = _ignore
    should_stop: Callable[[], bool] = _ignore
    may: Callable[[str], bool] = _ignore

    def stage(self, name: str, unit: Unit = Unit.TOKENS) -> Progress:
        """Begin a stage; its work reports to what is returned, which may raise StoppedError."""
        self.on_stage(name, unit)
        return self._count

    def _count(self, done: int, total: int) -> None:
        self.on_progress(done, total)
        if self.should_stop():
            raise StoppedError


@dataclass(frozen=True)
class Phase:
    """All stages of one name, with what follows each of them until the next."""

    name: str
    seconds: float


class Stopwatch:
    """Times the stages of a workflow, from its making on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name = ""
        self._since_s = time.monotonic()

    def before(self, on_stage: Callable[[str, Unit], object]) -> Callable[[str, Unit], object]:
        """Return a callback that notes a stage, and then calls `on_stage`."""

        def begin(name: str, unit: Unit) -> object:
            self._note(name)
            return on_stage(name, unit)

        return begin

    def stop(self) -> tuple[Phase, ...]:
        """The phases in their order; what came before the first counts to it."""
        self._note(self._name)
        return tuple(Phase(name, seconds) for name, seconds in self._seconds.items())

    def _note(self, name: str) -> None:
        now_s = time.monotonic()
        before = self._name or name
        self._seconds[before] = self._seconds.get(before, 0.0) + now_s - self._since_s
        self._name, self._since_s = name, now_s
