"""Chat templates rendered in a child process, with limits on time and memory."""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from converter.errors import PopError
from pop_local.engine import template_child
from pop_local.engine.llama.upstream import Jinja2ChatFormatter, chat_format

LIMIT_S = 5.0
LIMIT_BYTES = 512 * 2**20
# Those of public models have some tens of thousands.
MAX_TEMPLATE_CHARACTERS = 1 << 20
_START = (
    "import sys; sys.path[:] = sys.argv[3:];"
    f" from {template_child.__name__} import main; main(*sys.argv[1:3])"
)


class LimitedChatFormatter(Jinja2ChatFormatter):
    """llama_cpp's own, but for where it renders.

    Raises ValueError for what is no template, and where one refuses, and PopError where it goes
    beyond the limits.
    """

    def __init__(self, template: str, *arguments: Any, **options: Any) -> None:
        super().__init__("", *arguments, **options)
        self.template = template
        self._environment = self  # type: ignore[assignment]  # it asks this to render
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"its chat template has {len(template):,} characters")
        try:
            _renderer.render(template, None)
        except ValueError as error:
            raise ValueError(f"its chat template is broken: {error}") from error

    def render(self, **arguments: Any) -> str:
        """Render the template; functions among the arguments are the child's own."""
        plain = {name: value for name, value in arguments.items() if not callable(value)}
        return _renderer.render(self.template, plain)


def start() -> None:
    """Start the child, which takes a part of a second, before it is needed."""
    _renderer.start()


class _Renderer:
    """The one child of this process, begun again after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def start(self) -> None:
        with self._lock:
            self._started()

    def render(self, template: str, arguments: dict[str, Any] | None) -> str:
        call = json.dumps([template, arguments]).encode() + b"\n"
        with self._lock:
            line = self._answer(self._started(), call)
        if not line.endswith(b"\n"):
            raise PopError(
                f"the chat template takes more than {LIMIT_S:g} s, or more than"
                f" {LIMIT_BYTES >> 20} MiB",
                "take the model from another publisher",
            )
        answer: dict[str, str] = json.loads(line)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return answer["text"]

    def close(self) -> None:
        if self._process is None or self._owner != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        # After a fork the child is still the other process's.
        if self._process is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(LIMIT_S), str(LIMIT_BYTES), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], call: bytes) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        line = b""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(call)
                process.stdin.flush()
                line = process.stdout.readline()
        except BaseException:  # what it answers later belongs to no call
            self.close()
            raise
        if not line.endswith(b"\n"):
            self.close()
        return line


_renderer = _Renderer()
# Also the ones that llama_cpp makes of what a file says while it opens it.
chat_format.Jinja2ChatFormatter = LimitedChatFormatter  # type: ignore[misc]
