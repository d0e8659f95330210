"""Identify the build machine's CPU, for which local builds are optimized."""

import platform
import re
import subprocess
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_RELEVANT = re.compile(r"^(?:model name|flags|Features|CPU part)\s*:.*$", re.MULTILINE)


def cpu() -> str:
    """Return the CPU's architecture and, if known, its model and instruction sets."""
    parts = [platform.machine()]
    if _CPUINFO.is_file():
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        parts += _RELEVANT.findall(first)
    elif platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        parts.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    else:
        parts.append(platform.processor())
    return "; ".join(parts)
