"""The caller's side of a process with limits."""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.spawn import get_executable
from typing import Any

from pop_local.base.errors import PopError

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; import importlib, json;"
    " module, *arguments = json.loads(sys.argv[1]);"
    " importlib.import_module(module).main(*arguments)"
)


class RefusedError(PopError):
    """The child refuses; message and hint are its own."""


class NoChildError(PopError):
    """The process did not start, which is nobody's fault but the machine's."""


class BeyondLimitsError(PopError):
    """The call took more time or memory than it may."""


def _python() -> str:
    """The interpreter for children: multiprocessing's, which who embeds Python may name."""
    python = os.fsdecode(get_executable())
    if getattr(sys, "frozen", False) and python == sys.executable:
        raise NoChildError(
            "a frozen application has no Python for templates, grammars and large pictures",
            "name one, with the same packages: multiprocessing.set_executable(...)",
        )
    return python


class LimitedProcess:
    """A child that runs `main(*arguments, limit_s, limit_bytes)` of a module.

    One call at a time. A call that fails or is interrupted ends the child.
    """

    def __init__(self, module: str, *arguments: Any, limit_s: float, limit_bytes: int) -> None:
        self._owner = os.getpid()
        self._is_ready = False
        called = json.dumps([module, *arguments, limit_s, limit_bytes])
        self._process = subprocess.Popen(
            [_python(), "-I", "-c", _START, called, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def is_alive(self) -> bool:
        """False after a fork, too: the child is the other process's."""
        return self._owner == os.getpid() and self._process.poll() is None

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method; arguments and result are what JSON knows.

        Raises RefusedError, BeyondLimitsError, NoChildError.
        """
        line = self._answer([name, *arguments])
        if not line.endswith(b"\n"):
            self.close()
            if not self._is_ready:
                raise NoChildError("a child process ended before its work began")
            raise BeyondLimitsError("it goes beyond its limits")
        answer = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"], answer.get("hint", ""))
        return answer["result"]

    def _answer(self, call: list[Any]) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            if not self._is_ready:
                self._is_ready = stdout.readline().endswith(b"\n")
            with suppress(OSError):  # it ended before
                stdin.write(json.dumps(call).encode() + b"\n")
                stdin.flush()
                return stdout.readline()
        except BaseException:  # what it answers later belongs to no call
            self.close()
            raise
        return b""

    def close(self) -> None:
        """End the child; that of another process is left alone."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what it never read
                pipe.close()


class KeptProcess:
    """The one child of this process for a module's work, begun again after it has ended.

    May be used from several threads.
    """

    def __init__(self, module: str, *, limit_s: float, limit_bytes: int) -> None:
        self.limit_s, self.limit_bytes = limit_s, limit_bytes
        self._module = module
        self._lock = threading.RLock()
        self._process: LimitedProcess | None = None
        atexit.register(self.close)

    @property
    def limits(self) -> str:
        """The limits of one call, for messages."""
        return f"more than {self.limit_s:g} s, or more than {self.limit_bytes >> 20} MiB"

    def start(self) -> LimitedProcess:
        """Start the child, which takes a part of a second, before it is needed."""
        with self._lock:
            if self._process is None or not self._process.is_alive:
                self.close()
                self._process = LimitedProcess(
                    self._module, limit_s=self.limit_s, limit_bytes=self.limit_bytes
                )
            return self._process

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method as LimitedProcess does."""
        with self._lock:
            return self.start().call(name, *arguments)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None
