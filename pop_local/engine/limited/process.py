"""Start child processes and call functions in them, with limits on time and memory.

multiprocessing, and so every pool built on it, imports the main module again in a spawned child, so
it would run a user's script twice if the script lacks an `if __name__ == "__main__"` guard. A
forked child would inherit llama.cpp's locks without its threads.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.spawn import get_executable
from typing import Any

from pop_base.errors import PopError

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; import json;"
    " from pop_local.engine.limited.child import main; main(*json.loads(sys.argv[1]))"
)


class RefusedError(PopError, ValueError):
    """Error that repeats the message and the hint of the child process's exception."""


class NoChildError(PopError):
    """Error raised when a child process cannot be started."""


class BeyondLimitsError(PopError):
    """Error raised when a call exceeds its time or memory limit."""


def _python() -> str:
    """Return the Python interpreter that multiprocessing uses for child processes."""
    python = os.fsdecode(get_executable())
    if getattr(sys, "frozen", False) and python == sys.executable:
        raise NoChildError(
            "this frozen application cannot process templates, grammars, or large images",
            "call multiprocessing.set_executable with the path of a Python interpreter in an"
            " environment that contains pop_local",
        )
    return python


class KeptProcess:
    """A child process that runs a worker's methods. A call restarts the process if it has exited.

    Calls are thread-safe and run one at a time. If a call is interrupted or exceeds a limit, the
    parent kills the child process. `close` ends a call that runs in another thread.
    """

    def __init__(
        self, worker: type, *, limit_s: float, limit_bytes: int, task: str = "it", hint: str = ""
    ) -> None:
        """`worker`: the class whose methods the child runs.

        `task`: the subject of BeyondLimitsError's message. `hint`: the hint in BeyondLimitsError.
        """
        self.limit_s, self.limit_bytes = limit_s, limit_bytes
        self._worker, self._task, self._hint = worker, task, hint
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._is_ready = False
        atexit.register(self.close)

    @property
    def limits(self) -> str:
        return f"{self.limit_s:g} s or {self.limit_bytes >> 20} MiB"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the child process if needed. Startup takes a fraction of a second."""
        with self._lock:
            child, worker = self._child, self._worker
            # After a fork, the child still belongs to the process that started it.
            if child is None or self._owner != os.getpid() or child.poll() is not None:
                self.close()
                options = [worker.__module__, worker.__qualname__, self.limit_s, self.limit_bytes]
                child = self._child = subprocess.Popen(
                    [_python(), "-I", "-c", _START, json.dumps(options), *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                self._owner, self._is_ready = os.getpid(), False
            return child

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method with JSON arguments and return its JSON result.

        Raises RefusedError, BeyondLimitsError, or NoChildError.
        """
        with self._lock:
            child = self.start()
            assert child.stdin is not None and child.stdout is not None
            try:
                self._is_ready = self._is_ready or bool(child.stdout.readline())
                with suppress(OSError):  # the child has ended
                    child.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
                    child.stdin.flush()
                line = child.stdout.readline()
            except BaseException:  # otherwise the next call would read this call's result
                self.close()
                raise
            if not line.endswith(b"\n"):
                self.close()
                if not self._is_ready:
                    raise NoChildError("a child process exited before its first call")
                raise BeyondLimitsError(f"{self._task} takes more than {self.limits}", self._hint)
        answer = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"], answer.get("hint", ""))
        return answer["result"]

    def close(self) -> None:
        """Kill the child process if the current process started it."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()  # also closes the pipes
