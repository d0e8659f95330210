"""Default number of CPU threads."""

import os
from pathlib import Path

import psutil


def default_threads() -> int:
    """Return the number of physical cores that this process may use.

    Two threads on one core are slower than one.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        try:
            return len({Path(siblings.format(cpu)).read_text() for cpu in cpus})
        except OSError:
            return len(cpus)
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
