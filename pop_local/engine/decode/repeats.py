"""Detect answers that are stuck repeating a block of tokens."""

import re
from collections import deque

_LONGEST = 64
# Minimum numbers of repeated tokens and of repeats for blocks of prose.
_N_TOKENS, _N_TIMES = 128, 3
# Other blocks need more repeats, because users may request repeated numbers, words or table rows.
_N_TIMES_OF_ANY = 256
_WORD = r"[\"'“]?(?:[^\W\d_]+|\d[\d.,]*)"
# Five words, of which the first three are not numbers.
_WORDS = re.compile(rf"(?:[\"'“]?[^\W\d_]+[\"'”]?[,;:]? ){{3}}{_WORD}[\"'”]?[,;:]? {_WORD}")
_SENTENCE_END = re.compile(r"[.!?…][\"'”»*]?\s")


class Repeats:
    """A detector for answers that repeat themselves."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, bytes]] = deque(maxlen=_LONGEST + 1)
        # By block length: the number of trailing tokens that match the token one block earlier.
        self._n_equal = [0] * (_LONGEST + 1)

    def push(self, token: int, piece: bytes) -> bool:
        """Add a token. Return whether the answer is stuck repeating a block."""
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
        text = (2 * block).decode(errors="ignore")  # a block may start inside a sentence
        return bool(_WORDS.search(text) and _SENTENCE_END.search(text))
