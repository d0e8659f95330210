"""Forward llama.cpp's log to `logging`, and keep error lines for use in exceptions.

The logger "pop_local.llama_cpp" is silent unless the application configures it. Some damaged files
cause an assertion in llama.cpp to fail. llama.cpp then calls `on_abort` and aborts the process.
"""

import ctypes
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pop_base.errors import PopError

logger = logging.getLogger("pop_local.llama_cpp")
logger.addHandler(logging.NullHandler())

# enum ggml_log_level of ggml.h; llama_cpp's own table numbers them differently.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5


class _Errors(threading.local):
    """The current thread's error lines. An error message must not quote other threads' errors."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=64)


_errors = _Errors()
_last_level = logging.DEBUG
_callbacks: tuple[Any, ...] = ()  # llama.cpp does not keep them alive
_is_first_call = threading.Lock()
# Called with the reason in the aborting thread, before the process ends. None: write to stderr.
on_abort: Callable[[str], None] | None = None

_PLACE = re.compile(r"^.*[/\\](?=[\w.-]+:\d+: )")
_FUNCTION = re.compile(r"^\w+: ")
_WRAPPING = re.compile(r"^error loading model( \w+)?: ")


def take_over(llama_cpp: Any, ggml: ctypes.CDLL) -> None:
    """Redirect llama.cpp's log from stderr to `logging`, and ggml's aborts to `on_abort`.

    Only the first call has an effect, because llama.cpp may keep using the first callbacks.
    """
    global _callbacks
    if not _is_first_call.acquire(blocking=False):
        return
    stderr = 2
    with suppress(OSError):  # llama_cpp redirects descriptor 2 while it opens a model
        stderr = os.dup(2)

    def report(message: bytes) -> None:
        reason = _PLACE.sub("", message.decode("utf-8", errors="replace"))
        if on_abort is not None:
            on_abort(reason)
        else:
            os.write(stderr, f"llama.cpp aborted: {reason}\n".encode())

    _callbacks = (
        llama_cpp.llama_log_callback(_on_log),
        ctypes.CFUNCTYPE(None, ctypes.c_char_p)(report),
    )
    llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    ggml.ggml_set_abort_callback(_callbacks[1])


def take_over_images(mtmd: Any) -> None:
    """Redirect libmtmd's log. Call `take_over` first."""
    mtmd.mtmd_helper_log_set(_callbacks[0], ctypes.c_void_p(0))


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    global _last_level
    line = text.decode("utf-8", errors="replace").rstrip()
    if level != _CONTINUED:
        _last_level = _LEVELS.get(level, logging.DEBUG)
    if _last_level == logging.ERROR and line:
        if level == _CONTINUED and _errors.lines:
            _errors.lines[-1] += line
        else:
            _errors.lines.append(line)
    if line and logger.isEnabledFor(_last_level):
        logger.log(_last_level, line)


def forget_errors() -> None:
    """Clear this thread's logged errors. Call this function before an operation that may fail."""
    _errors.lines.clear()


def not_decoded(code: int) -> PopError:
    """Return the error for a batch that llama_decode rejected with `code`."""
    return PopError(first_error() or f"llama.cpp could not decode the batch (code {code})")


def first_error() -> str:
    """Return the first error since `forget_errors` ran, or "" if none. Omit function names."""
    if not _errors.lines:
        return ""
    line = _FUNCTION.sub("", _errors.lines[0])
    while (shorter := _WRAPPING.sub("", line)) != line:
        line = shorter
    return line
