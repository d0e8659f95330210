"""The child's side: answers calls, a line of JSON each, until one goes beyond the limits."""

import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from pop_converter.base.errors import PopError


def main(module: str, worker: str, limit_s: float, limit_bytes: int) -> None:
    """Answer calls of a module's class from standard input until it is closed.

    A call that takes longer than `limit_s` ends this process; memory is limited to `limit_bytes`
    more than there is in use now, on Linux. An error of a method is its refusal.
    """
    work = getattr(importlib.import_module(module), worker)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever calls
    _limit_memory(limit_bytes)
    print("{}", flush=True)
    with Path(os.devnull).open("w") as nowhere:
        for line in sys.stdin.buffer:
            name, *arguments = json.loads(line)
            faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
            answer: dict[str, object]
            try:
                answer = {"result": getattr(work, name)(*arguments)}
            except PopError as error:
                answer = {"refused": error.message, "hint": error.hint}
            except Exception as error:
                told = f"{type(error).__name__}: {error}".removesuffix(": ")
                answer = {"refused": str(error) if isinstance(error, ValueError) else told}
            written = json.dumps(answer)
            faulthandler.cancel_dump_traceback_later()
            print(written, flush=True)


def _limit_memory(n_more_bytes: int) -> None:
    used = Path("/proc/self/statm")
    if not used.exists():
        return
    import resource

    n_bytes = int(used.read_text().split()[0]) * resource.getpagesize() + n_more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
