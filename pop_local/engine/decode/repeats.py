"""Detection of answers that repeat one block of tokens without end."""

import re
from collections import deque

_LONGEST = 64
# Minimum tokens and repeats of a sentence.
_N_TOKENS, _N_TIMES = 128, 3
# Users may request repeated numbers, words, table rows or code, so these need more repeats.
_N_TIMES_OF_ANY = 256
_WORDS = re.compile(r"(?:[\"'“]?[^\W\d_]+[\"'”]?[,;:]? ){4}[\"'“]?[^\W\d_]+")
_SENTENCE_END = re.compile(r"[.!?…][\"'”»*]?\s")


class Repeats:
    """Detector of an answer that only repeats its last block of tokens."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, bytes]] = deque(maxlen=_LONGEST + 1)
        # By block length: how many of the last tokens equal the token one block earlier.
        self._n_equal = [0] * (_LONGEST + 1)

    def push(self, token: int, piece: bytes) -> bool:
        """Add a token of the answer. Return whether the answer only repeats itself."""
        self._last.append((token, piece))
        for length in range(1, len(self._last)):
            is_equal = self._last[-1 - length][0] == token
            self._n_equal[length] = self._n_equal[length] + 1 if is_equal else 0
        return any(map(self._is_stuck, range(1, _LONGEST + 1)))

    def _is_stuck(self, length: int) -> bool:
        n_equal = self._n_equal[length]
        if n_equal < max(_N_TOKENS, _N_TIMES * length):
            return False
        return n_equal >= _N_TIMES_OF_ANY * length or self._is_prose(length)

    def _is_prose(self, length: int) -> bool:
        block = b"".join(piece for _, piece in [*self._last][-length:])
        text = (2 * block).decode(errors="ignore")  # it may start inside the sentence
        return bool(_WORDS.search(text) and _SENTENCE_END.search(text))
