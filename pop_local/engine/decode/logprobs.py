"""Log probabilities of sampled tokens."""

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.chat_messages import TokenLogprob
from pop_local.engine.llama.context import require_finite
from pop_local.engine.llama.slot import Slot
from pop_local.engine.llama.vocabulary import Pieces


class Logprobs:
    """Sampled tokens' log probabilities before temperature, penalties, and grammar are applied."""

    def __init__(self, slot: Slot, n_top: int) -> None:
        self._slot = slot
        self._pieces = Pieces(slot.context.vocabulary)
        self._n_top = n_top
        self._end = 0
        # (offset of the token's first byte in the answer, log probability)
        self._pending: list[tuple[int, TokenLogprob]] = []

    def push(self, token: int) -> None:
        """Store a token's log probability before the next decode overwrites the logits."""
        logprob = _of_token(self._pieces, self._slot.logits[-1], token, self._n_top)
        self._pending.append((self._end, logprob))
        self._end += len(logprob.text)

    def take(self, n_shown: float) -> tuple[TokenLogprob, ...]:
        """Remove and return the log probabilities of tokens that start before byte `n_shown`."""
        taken = tuple(logprob for start, logprob in self._pending if start < n_shown)
        self._pending = self._pending[len(taken) :]
        return taken


def _of_token(pieces: Pieces, logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    highest = float(logits.max())
    require_finite(highest)
    norm = highest + float(np.log(np.exp(logits - highest, dtype=np.float32).sum(dtype=np.float64)))
    top = np.argpartition(logits, -n_top)[-n_top:] if n_top else np.empty(0, int)
    ranked = top[np.argsort(-logits[top], kind="stable")]
    top_logprobs = [TokenLogprob(int(i), pieces[int(i)], float(logits[i]) - norm) for i in ranked]
    return TokenLogprob(token, pieces[token], float(logits[token]) - norm, tuple(top_logprobs))
