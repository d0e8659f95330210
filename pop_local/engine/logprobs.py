"""Log probabilities of tokens, sampled ones and those of a prompt."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.decode.text import Pieces
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.turn import Likely, TokenLogprob

# Each takes n_vocab * 4 bytes in llama.cpp's buffer, which never shrinks.
_MAX_ROWS = 64


class Logprobs:
    """The log probabilities of the sampled tokens, given out along with the text.

    They are the model's own: of its logits as they are, before temperature, penalties or grammar.
    """

    def __init__(self, model: PrunedLlama, n_top: int) -> None:
        self._ctx = model.ctx
        self._n_vocab = model.n_vocab()
        self._pieces = Pieces(model.vocab)
        self._n_top = n_top
        self._end = 0
        # With the byte of the answer where each begins.
        self._waiting: list[tuple[int, TokenLogprob]] = []

    def push(self, token: int) -> None:
        """Keep the token's. The next decode overwrites the logits, so this comes before it."""
        row = bindings().llama_get_logits_ith(self._ctx, -1)
        logits = np.ctypeslib.as_array(row, (self._n_vocab,))
        logprob = _of_token(self._pieces, logits, token, self._n_top)
        self._waiting.append((self._end, logprob))
        self._end += len(logprob.text)

    def take(self, n_shown: int) -> tuple[TokenLogprob, ...]:
        """Give out those of the tokens that begin within the first `n_shown` bytes, once."""
        taken = tuple(logprob for start, logprob in self._waiting if start < n_shown)
        self._waiting = self._waiting[len(taken) :]
        return taken


def prompt_logprobs(model: PrunedLlama, tokens: Sequence[int], n_top: int) -> list[TokenLogprob]:
    """Find that of each token of a prompt; the first one, which nothing precedes, has none.

    Every row asks for logits, so all of them run in full, and take the place of the KV cache.
    """
    pieces = Pieces(model.vocab, special=True)
    found = [TokenLogprob(pieces[tokens[0]], None)]
    for logits in _all_logits(model, tokens):
        for row in logits[: len(tokens) - len(found)]:
            found.append(_of_token(pieces, row, tokens[len(found)], n_top))
    return found


def _all_logits(model: PrunedLlama, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
    """(n, n_vocab) for piece after piece of the prompt, valid until the next one."""
    model.clear()
    logs.forget_errors()
    step = min(_MAX_ROWS, model.n_batch)
    with model.interrupt.watching(model.ctx):
        for start in range(0, len(tokens), step):
            piece = tokens[start : start + step]
            model._decode(piece, Outputs.ALL, model.rule, 0)
            model.interrupt.check()
            logits = bindings().llama_get_logits(model.ctx)
            yield np.ctypeslib.as_array(logits, (len(piece), model.n_vocab()))


def _of_token(pieces: Pieces, logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    highest = float(logits.max())
    norm = highest + float(np.log(np.exp(logits - highest, dtype=np.float32).sum(dtype=np.float64)))
    top = np.argpartition(logits, -n_top)[-n_top:] if n_top else np.empty(0, int)
    ranked = top[np.argsort(-logits[top], kind="stable")]
    return TokenLogprob(
        text=pieces[token],
        logprob=float(logits[token]) - norm,
        top=tuple(Likely(pieces[int(i)], float(logits[i]) - norm) for i in ranked),
    )
