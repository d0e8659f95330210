"""Run calls in a child process. Each call and each result is one line of JSON."""

import faulthandler
import importlib
import json
import signal
import sys
from pathlib import Path

from pop_base.errors import PopError


def main(module: str, worker: str, limit_s: float, limit_bytes: int) -> None:
    """Read calls to `worker`'s methods from standard input and run them until the input ends.

    A call that takes longer than `limit_s` seconds terminates this process. On Linux, a call may
    use up to `limit_bytes` more memory than the process used at startup. If a method raises an
    exception, the caller gets a RefusedError.
    """
    work = getattr(importlib.import_module(module), worker)()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _limit_memory(limit_bytes)
    print("{}", flush=True)
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        faulthandler.dump_traceback_later(limit_s, exit=True)
        answer: dict[str, object]
        try:
            answer = {"result": getattr(work, name)(*arguments)}
        except PopError as error:
            answer = {"refused": error.message, "hint": error.hint}
        except Exception as error:
            named = f"{type(error).__name__}: {error}".removesuffix(": ")
            answer = {"refused": str(error) if isinstance(error, ValueError) else named}
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
