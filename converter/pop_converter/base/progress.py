"""How far some work is: the sum of its steps, told to whoever asked."""

from collections.abc import Callable

# Called with what is done and the total.
Progress = Callable[[int, int], object]
# Called with the size of each step.
Ran = Callable[[int], None]


def counting(total: int, on_progress: Progress) -> Ran:
    """Return a function that takes the size of each step and tells `on_progress` the sum.

    `on_progress` gets (done, total), for the first time with nothing done.
    """
    done = 0

    def ran(n: int) -> None:
        nonlocal done
        done += n
        on_progress(done, total)

    ran(0)
    return ran
