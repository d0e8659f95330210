"""Streamed text from sampled tokens, in whole characters and without stop strings."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Text decoded from bytes that arrive in pieces.

    It holds back an incomplete character, and text that may be the start of a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stop = ""

    def push(self, piece: bytes) -> str:
        """Return the text that may be shown now, and set `stop` at a stop string."""
        self._held += self._decoder.decode(piece)
        return self._release()

    def ignore_stops(self) -> None:
        self._stops = ()

    def flush(self) -> str:
        """Return the text held back, at the end of an answer.

        Incomplete characters are dropped. After a stop string the text is empty.
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
        """Return how many characters of the stop string the text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
