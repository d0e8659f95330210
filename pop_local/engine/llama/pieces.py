"""The bytes of single tokens."""

import ctypes
from collections.abc import Container
from typing import Any, Protocol

from pop_local.engine.llama.backend import bindings


class VocabOwner(Protocol):
    """An owner of a llama_vocab, such as a Context."""

    @property
    def vocab(self) -> Any: ...


class Pieces:
    """Map from tokens to bytes. Control tokens map to b"" unless they are in `shown`."""

    def __init__(self, context: VocabOwner, shown: Container[int] = ()) -> None:
        self._context = context  # keeps the vocabulary alive
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
