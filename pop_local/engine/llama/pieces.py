"""The bytes of single tokens."""

import ctypes
from collections.abc import Container
from typing import TYPE_CHECKING

from pop_local.engine.llama.backend import bindings

if TYPE_CHECKING:
    from pop_local.engine.llama.context import Context


class Pieces:
    """The bytes of single tokens; control tokens have none unless they are `shown`."""

    def __init__(self, context: "Context", shown: Container[int] = ()) -> None:
        self._context = context  # which stays open as long as somebody asks
        self._vocab = context.vocab
        self._shown = shown
        self._to_piece = bindings().llama_token_to_piece
        self._buffer = ctypes.create_string_buffer(64)

    def __getitem__(self, token: int) -> bytes:
        n = self._write(token)
        if n < 0:
            self._buffer = ctypes.create_string_buffer(-n)
            n = self._write(token)
        return self._buffer.raw[:n]

    def _write(self, token: int) -> int:
        size = len(self._buffer)
        is_shown = token in self._shown
        return int(self._to_piece(self._vocab, token, self._buffer, size, 0, is_shown))
