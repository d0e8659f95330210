"""llama.cpp's log, taken over: handed to `logging`, and its complaints kept for error messages.

Silent unless the application configures the logger "pop_local.llama_cpp". Where llama.cpp ends the
process, as its assertions do for some damaged files, `on_abort` is told why.
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

from pop_converter.base.errors import PopError

logger = logging.getLogger("pop_local.llama_cpp")
logger.addHandler(logging.NullHandler())

# enum ggml_log_level of ggml.h; llama_cpp's own table numbers them differently.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5


class _Errors(threading.local):
    """Each thread's own: what another one tries meanwhile is no reason for what fails here."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=64)


_errors = _Errors()
_last_level = logging.DEBUG
_callback: Any = None
_abort_callback: Any = None
# Called with the reason in whichever thread it happens; the process ends afterwards, come what may.
# None: it is written to stderr.
on_abort: Callable[[str], None] | None = None

_PLACE = re.compile(r"^.*[/\\](?=[\w.-]+:\d+: )")
_FUNCTION = re.compile(r"^\w+: ")
_WRAPPING = re.compile(r"^error loading model( \w+)?: ")


def take_over(llama_cpp: Any) -> None:
    """Make llama.cpp log here; llama_cpp's own callback printed to stderr."""
    global _callback
    if _callback is None:
        _callback = llama_cpp.llama_log_callback(_on_log)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def take_over_images(mtmd: Any) -> None:
    """Make libmtmd log here, too, after llama.cpp does."""
    mtmd.mtmd_helper_log_set(_callback, ctypes.c_void_p(0))


def take_over_aborts(ggml: ctypes.CDLL) -> None:
    """Make ggml tell `on_abort`."""
    global _abort_callback
    if _abort_callback is not None:
        return
    stderr = 2
    with suppress(OSError):  # llama_cpp silences the one that everybody has while it opens a model
        stderr = os.dup(2)

    def tell(message: bytes) -> None:
        reason = _PLACE.sub("", message.decode("utf-8", errors="replace"))
        if on_abort is not None:
            on_abort(reason)
        else:
            os.write(stderr, f"llama.cpp gave up: {reason}\n".encode())

    _abort_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(tell)
    ggml.ggml_set_abort_callback(_abort_callback)


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
    """To be called before something is tried, so that `first_error` speaks of that."""
    _errors.lines.clear()


def not_decoded(code: int) -> PopError:
    """The error for a batch that llama_decode refused."""
    return PopError(first_error() or f"llama.cpp could not decode (code {code})")


def first_error() -> str:
    """The first error line since then without the names of functions, or nothing."""
    if not _errors.lines:
        return ""
    line = _FUNCTION.sub("", _errors.lines[0])
    while (shorter := _WRAPPING.sub("", line)) != line:
        line = shorter
    return line
