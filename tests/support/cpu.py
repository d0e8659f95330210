"""Features of the processor that the tests run on."""

from pathlib import Path


def has_amx() -> bool:
    """Whether the kernels for Intel's AMX run here.

    With the shapes of small Gemma 3n and 4 models they give what depends on whatever was computed
    before, in the unpatched library, too: seen with the release in upstream.txt.
    """
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_int8" in info.read_text()
