"""Choose between pop-local's and llama.cpp's CPU kernels by measuring both on this machine.

ggml_pop_choose (fast/measure.cpp) measures, decides, and stores the timings. The user's cache
folder holds one file for each combination of CPU, build, and thread count.
"""

import ctypes
import functools
import hashlib
import os
from pathlib import Path

import platformdirs

from pop_local.engine.llama import backend, devices

# If this environment variable is set, pop-local's kernels are used without measuring.
VARIABLE = "GGML_POP_KERNELS"
REPACKED = "/repacked"
ALL = "all"  # measures all kinds again


@functools.cache
def choice_for(types: frozenset[int], n_threads: int) -> str:
    """Return the choice of kernels for a model, in the format of llama_pop_choose_kernels.

    `types`: the weights' types. The first call on a machine takes up to 1.5 s.
    """
    return measured(" ".join(map(str, ("attention", *sorted(types)))), n_threads)[0]


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
        Path(api._lib._name).stat().st_mtime_ns,
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return platformdirs.user_cache_path("pop-local") / f"kernels-{digest[:16]}.txt"
