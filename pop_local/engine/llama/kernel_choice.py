"""Choose between pop-local's and llama.cpp's CPU kernels by measuring both on this machine.

ggml_pop_choose (fast/measure.cpp) measures, decides, and stores the timings. The user's cache
folder has a file for each combination of CPU, build, and thread count.
"""

import ctypes
import hashlib
import os
from pathlib import Path

import platformdirs

from pop_local.engine.llama import backend, devices

# If this environment variable is set, pop-local's kernels are used without measuring.
VARIABLE = "GGML_POP_KERNELS"
ALL = "all"  # measures all kinds again


def stored_choice(n_threads: int) -> str:
    """Return the choice of kernels from the stored timings, or "" if nothing has been measured.

    The choice has the format of llama_pop_choose_kernels.
    """
    return measured("", n_threads)[0]


def measured(kinds: str, n_threads: int) -> list[str]:
    """Return the choice, and a line for each kind with its median times.

    Measures `kinds` (type numbers, "attention", or ALL) unless the file has their timings. Returns
    an empty choice if VARIABLE is set.
    """
    if VARIABLE in os.environ:
        return [""]
    words = kinds.encode(), os.fsencode(timings_file(n_threads))
    values = ctypes.c_int(n_threads), *map(ctypes.c_char_p, words)
    return devices.call_cpu("ggml_pop_choose", *values).split("\n")


def timings_file(n_threads: int) -> Path:
    """Return the path of the timings file for this CPU, build, and number of threads."""
    api = backend.bindings()
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = (
        *(each.description for each in devices.devices() if not each.is_gpu),
        *(api.llama_print_system_info(), devices.cpu_kernels(), n_threads, n_cpus),
        backend.version(),
        Path(api._lib._name).stat().st_mtime_ns,
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return platformdirs.user_cache_path("pop-local") / f"kernels-{digest[:16]}.txt"
