"""From sampled tokens to text that may be shown: whole characters, nothing of a stop string."""

import codecs
from collections.abc import Sequence


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
