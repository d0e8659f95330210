"""A core for each worker of pytest-xdist and its children; conftest imports this before all else.

llama.cpp then takes one thread: two threads that wait for each other on one core are many times
slower. numpy counts the cores when it is loaded, and its sums depend on their number: what a child
computes would differ from what a worker computes that was pinned later.
"""

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")

if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})
