"""Log probabilities of sampled tokens and of prompt tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.chat_messages import TokenLogprob
from pop_local.engine.llama.context import require_finite
from pop_local.engine.llama.slot import Slot
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prefill.read import append_all

# Each row needs n_vocab * 4 bytes in llama.cpp's buffer, which never shrinks.
_MAX_ROWS = 64


class Logprobs:
    """Log probabilities of sampled tokens before temperature, penalties and grammar apply."""

    def __init__(self, slot: Slot, n_top: int) -> None:
        self._slot = slot
        self._pieces = Pieces(slot.context.vocabulary)
        self._n_top = n_top
        self._end = 0
        # (offset of the token's first byte in the answer, log probability)
        self._pending: list[tuple[int, TokenLogprob]] = []

    def push(self, token: int) -> None:
        """Store a token's log probability before the next decode overwrites the logits."""
        logprob = _of_token(self._pieces, self._slot.logits, token, self._n_top)
        self._pending.append((self._end, logprob))
        self._end += len(logprob.text)

    def take(self, n_shown: float) -> tuple[TokenLogprob, ...]:
        """Remove and return the log probabilities of tokens that start before byte `n_shown`."""
        taken = tuple(logprob for start, logprob in self._pending if start < n_shown)
        self._pending = self._pending[len(taken) :]
        return taken


def prompt_logprobs(cache: KvCache, tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Return each prompt token's log probability (None for the first token).

    Replaces the cached rows. All new rows run all layers, because each row's logits are needed.
    """
    pieces = Pieces(cache.context.vocabulary, range(cache.context.vocabulary.n_tokens))
    found = [TokenLogprob(tokens[0], pieces[tokens[0]], None)]
    for n_rows in append_all(cache, tokens, _MAX_ROWS):
        for row in cache.context.logits(n_rows)[: len(tokens) - len(found)]:
            found.append(_of_token(pieces, row, tokens[len(found)], n_top))
    return found


def _of_token(pieces: Pieces, logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    highest = float(logits.max())
    require_finite(highest)
    norm = highest + float(np.log(np.exp(logits - highest, dtype=np.float32).sum(dtype=np.float64)))
    top = np.argpartition(logits, -n_top)[-n_top:] if n_top else np.empty(0, int)
    ranked = top[np.argsort(-logits[top], kind="stable")]
    top_logprobs = [TokenLogprob(int(i), pieces[int(i)], float(logits[i]) - norm) for i in ranked]
    return TokenLogprob(token, pieces[token], float(logits[token]) - norm, tuple(top_logprobs))
