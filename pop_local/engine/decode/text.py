"""Decode sampled tokens into text without incomplete characters or stop strings."""

import codecs
from collections.abc import Sequence


class TextStream:
    """An incremental decoder for an answer's bytes.

    The decoder holds back incomplete characters and text that may be the start of a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stop = ""

    def push(self, piece: bytes) -> str:
        """Return the text that can be shown now. Sets `stop` once a stop string is complete."""
        self._held += self._decoder.decode(piece)
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            n_shown, self.stop = min(found)
        else:
            n_held = max((n_begun(self._held, stop) for stop in self._stops), default=0)
            n_shown = len(self._held) - n_held
        shown, rest = self._held[:n_shown], self._held[n_shown:]
        self._held = "" if found else rest
        return shown

    def ignore_stops(self) -> None:
        self._stops = ()

    def flush(self) -> str:
        """Return the remaining text. Incomplete characters are dropped."""
        shown, self._held = self._held, ""
        return shown


def n_begun(text: str, whole: str) -> int:
    """Return the length of the longest proper prefix of `whole` that is a suffix of `text`."""
    longest = min(len(whole) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(whole[:n])), 0)
