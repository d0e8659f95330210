"""Child process that runs llama.cpp's chat code, which some templates and answers can crash.

The library is `libpop-chat` (patches/llama.cpp/common/pop/pop-chat.cpp).
"""

import ctypes
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NAMES = {"win32": "pop-chat.dll", "darwin": "libpop-chat.dylib"}


def _library() -> ctypes.CDLL:
    package = find_spec("llama_cpp")
    assert package is not None and package.origin is not None, "the backend must be installed"
    packaged = Path(package.origin).parent / "lib"
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or packaged)
    library = ctypes.CDLL(str(folder / _NAMES.get(sys.platform, "libpop-chat.so")))
    library.pop_chat_free.argtypes = [ctypes.c_void_p]
    for function in (library.pop_chat_render, library.pop_chat_parse):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_void_p
    return library


class ChatFormatter:
    """Methods that the parent process can call.

    All methods raise ValueError for input that llama.cpp rejects.
    """

    def __init__(self) -> None:
        self._library = _library()

    def render(self, request: dict[str, Any]) -> Any:
        """Return a prompt and the format of the answer."""
        return self._call(self._library.pop_chat_render, request)

    def parse(self, request: dict[str, Any]) -> Any:
        """Return the content, reasoning, and tool calls of a complete or partial answer."""
        return self._call(self._library.pop_chat_parse, request)

    def _call(self, function: Any, request: dict[str, Any]) -> Any:
        written = function(json.dumps(request).encode())
        try:
            answer = json.loads(ctypes.string_at(written))
        finally:
            self._library.pop_chat_free(written)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer
