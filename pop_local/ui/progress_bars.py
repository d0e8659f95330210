"""Show progress on stderr, as bars in a terminal and as occasional lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pop_base.progress import Unit
from pop_local.ui.console import err, note, printable

Advance = Callable[[int, int], None]
_NARROW_COLUMNS = 70
_LONG_TOKENS = 256
# Drawing takes CPU time from the model.
_DRAWN_PER_S = 4
_LINE_EVERY_S = 20.0
# The time left is computed from the rate over this period, which exceeds the longest batch.
_RATE_PERIOD_S = 3600.0


def stage_progress(what: str, unit: Unit) -> AbstractContextManager[Advance]:
    """Show a stage's progress, measured in `unit`, while the block runs."""
    if unit is Unit.BYTES:
        return _bar(what, DownloadColumn(), TransferSpeedColumn())
    return _bar(what, MofNCompleteColumn())


@contextmanager
def prefill_progress(what: str) -> Iterator[Advance]:
    """Show a prefill's progress in tokens and tokens/s, unless the prompt is short."""
    with ExitStack() as stack:
        bars: list[Advance] = []

        def advance(done: int, total: int) -> None:
            if not bars and total >= _LONG_TOKENS:
                rate = TextColumn("{task.fields[rate]}")
                bars.append(stack.enter_context(_bar(what, MofNCompleteColumn(), rate)))
            for bar in bars:
                bar(done, total)

        yield advance


@contextmanager
def _bar(what: str, *wide: ProgressColumn) -> Iterator[Advance]:
    is_drawn = err.is_interactive and sys.stderr.isatty()
    columns = (TaskProgressColumn(),) if err.width < _NARROW_COLUMNS else wide
    label = TextColumn("{task.description}", markup=False)
    progress = Progress(
        *(label, BarColumn(bar_width=None), *columns, TimeRemainingColumn(compact=True)),
        console=err,
        disable=not is_drawn,
        transient=True,
        expand=True,
        get_time=time.monotonic,
        refresh_per_second=_DRAWN_PER_S,
        speed_estimate_period=_RATE_PERIOD_S,
    )
    with progress:
        task_id = progress.add_task(printable(what), total=None, rate="")
        task, printed_s = progress.tasks[0], progress.get_time()

        def advance(done: int, total: int) -> None:
            nonlocal printed_s
            rate = f"{done / max(task.elapsed or 0.0, 1e-6):,.0f} tokens/s" if done else ""
            progress.update(task_id, completed=done, total=total or None, rate=rate)
            is_due = progress.get_time() - printed_s >= _LINE_EVERY_S
            if not is_drawn and is_due and done < total and task.time_remaining is not None:
                printed_s = progress.get_time()
                minutes, seconds = divmod(round(task.time_remaining), 60)
                note(f"{what}: {done / total:.0%}, {minutes}:{seconds:02} left")

        yield advance
