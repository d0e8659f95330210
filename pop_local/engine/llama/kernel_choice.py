"""Choose between pop-local's and llama.cpp's CPU kernels by measuring both on this machine.

ggml_pop_choose (fast/choose.cpp) measures, decides, and stores the timings. The user's cache
folder has a file for each combination of CPU, build, and thread count.
"""

import ctypes
import functools
import hashlib
import os
from collections import Counter
from pathlib import Path

import platformdirs

from pop_converter.gguf.source import Source
from pop_local.engine.llama import backend, devices

# If this environment variable is set, kernels are neither measured nor chosen by timings.
VARIABLE = "GGML_POP_KERNELS"
ALL = "all"  # measures all kinds again
ONLY = "only"  # starts a choice in which pop-local's kernels compute only the named kinds (ARM64)


def choice_for(source: Source, n_threads: int, *, flash_attn: bool) -> str:
    """Return the choice of kernels for a model, in the format of llama_pop_choose_kernels.

    On a new machine, measures the model's weight types and attention, which takes up to a second.
    """
    sizes: Counter[int] = Counter()
    for tensor in source.tensors:
        sizes[tensor.type] += tensor.size_bytes if len(tensor.dims) > 1 else 0
    types = [str(kind) for kind, _ in sizes.most_common()]
    return measured(" ".join([*types, "attention"] if flash_attn else types), n_threads)[0]


def measured(kinds: str, n_threads: int) -> list[str]:
    """Return the choice, and a line for each kind with its median times.

    Measures `kinds` (type numbers, "attention", or ALL) unless the file has their timings. Results
    are cached for the process's lifetime, so repeatable requests get the same answers.
    """
    path = timings_file(n_threads)
    return [""] if path is None else _measured(kinds, n_threads, path)


@functools.cache
def _measured(kinds: str, n_threads: int, path: Path) -> list[str]:
    words = kinds.encode(), os.fsencode(path)
    values = ctypes.c_int(n_threads), *map(ctypes.c_char_p, words)
    return devices.call_cpu("ggml_pop_choose", *values).split("\n")


def timings_file(n_threads: int) -> Path | None:
    """Return the timings file's path, or None if VARIABLE is set or a library cannot be read."""
    api = backend.bindings()
    library = Path(api._lib._name)
    try:
        stats = [each.stat() for each in (library, *sorted(library.parent.glob("*ggml-cpu*")))]
    except OSError:
        return None
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = (
        *(each.description for each in devices.devices() if not each.is_gpu),
        *(api.llama_print_system_info(), devices.cpu_kernels(), n_threads, n_cpus),
        *(backend.version(), *((each.st_mtime_ns, each.st_size) for each in stats)),
    )
    name = f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.txt"
    return None if VARIABLE in os.environ else platformdirs.user_cache_path("pop-local") / name
