"""The processor at hand, for which a build is compiled unless it is a portable one."""

import platform
import re
import subprocess
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_TELLING = re.compile(r"^(?:model name|flags|Features|CPU part)\s*:.*$", re.MULTILINE)


def cpu() -> str:
    """Its architecture, and where the system says so, its model and instructions."""
    said = [platform.machine()]
    if _CPUINFO.is_file():
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        said += _TELLING.findall(first)
    elif platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        said.append(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    else:
        said.append(platform.processor())
    return "; ".join(said)
