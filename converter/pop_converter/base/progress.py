"""Types of progress callbacks, and a counter of steps."""

from collections.abc import Callable

# Called with (done, total).
Progress = Callable[[int, int], object]
# Called with the size of each step.
Ran = Callable[[int], None]


def counting(total: int, on_progress: Progress) -> Ran:
    """Return a function that adds a step's size and calls `on_progress(done, total)`.

    `on_progress(0, total)` is called immediately.
    """
    done = 0

    def ran(n: int) -> None:
        nonlocal done
        done += n
        on_progress(done, total)

    ran(0)
    return ran
