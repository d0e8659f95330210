"""From sampled tokens to text that may be shown: whole characters, nothing of a stop string."""

import codecs
import ctypes
from collections.abc import Container, Sequence

from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context


class Pieces:
    """The bytes of single tokens; control tokens have none unless they are `shown`."""

    def __init__(self, context: Context, shown: Container[int] = ()) -> None:
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


class TextStream:
    """Text out of bytes that come in pieces.

    Half a character is held back until its other half comes, and so is what may turn out to be
    the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stop = ""

    def push(self, piece: bytes) -> str:
        """The text that may be shown now; `stop` is the stop string that ended it."""
        self._held += self._decoder.decode(piece)
        return self._release()

    def ignore_stops(self) -> None:
        self._stops = ()

    def flush(self) -> str:
        """Return the text held back, at the end of an answer; nothing after a stop string.

        Half a character is left out.
        """
        shown, self._held = self._held, ""
        return shown

    def _release(self) -> str:
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        n_held = max((self._n_begun(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - n_held]
        self._held = self._held[len(shown) :]
        return shown

    def _n_begun(self, stop: str) -> int:
        """How many characters of the stop string the text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
