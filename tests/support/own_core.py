"""Pin each pytest-xdist worker and its children to a core; conftest imports this module first.

llama.cpp then uses one thread: two threads on one core are many times slower. numpy counts the
cores when it is imported, and its sums depend on the count. If workers were pinned later, their
children would compute other bits.
"""

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")

if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})
