"""Features of the processor that runs the tests."""

from pathlib import Path


def has_amx() -> bool:
    """Return whether the kernels for Intel's AMX run here.

    For shapes of small Gemma 3n and 4 models, their results depend on earlier computations. The
    unpatched library has the same fault: seen with the release in upstream.txt.
    """
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_int8" in info.read_text()
