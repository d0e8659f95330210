"""Type aliases for progress callbacks, and a helper that adds up steps."""

from collections.abc import Callable

# Callback that receives the amount done and the total.
Progress = Callable[[int, int], object]
# Callback that receives each step's size.
Ran = Callable[[int], None]


def counting(total: int, on_progress: Progress) -> Ran:
    """Return a function that adds up step sizes and reports the sum to `on_progress`.

    `on_progress(0, total)` is called immediately.
    """
    done = 0

    def ran(n: int) -> None:
        nonlocal done
        done += n
        on_progress(done, total)

    ran(0)
    return ran
