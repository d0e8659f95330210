"""Text of the model's own, sampled at temperature 1, many sequences to a batch."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from converter.errors import PopError
from pop_local.calibration.loaded import LoadedModel
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings

MAX_SEQUENCES = 64
# Two levels of sums: a whole cumulative sum over the vocabulary would cost as much as the rest.
_BLOCK = 256


def sample_windows(
    model: LoadedModel,
    n_windows: int,
    n_window: int,
    *,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> NDArray[np.int32]:
    """Sample `n_windows` sequences, int32 [n_windows, n_window], at temperature 1.

    Each begins with the model's first token. `on_progress(done, total)` counts tokens. Raises
    PopError when llama.cpp fails or its logits are no numbers.
    """
    rng = np.random.default_rng(seed)
    parts = []
    done, total = 0, n_windows * n_window
    for n in _batches(n_windows):
        tokens = np.full((n, n_window), model.first_token, np.int32)
        for n_steps in _fill(tokens, model, rng):
            on_progress(done + n * n_steps, total)
        done += n * n_window
        parts.append(tokens)
    return np.concatenate(parts)


def _batches(n_windows: int) -> list[int]:
    """Split into batches of about equal size, none above MAX_SEQUENCES."""
    n_batches = -(-n_windows // MAX_SEQUENCES)
    return [len(part) for part in np.array_split(np.arange(n_windows), n_batches)]


def _fill(tokens: NDArray[np.int32], model: LoadedModel, rng: np.random.Generator) -> Iterator[int]:
    """Sample all but the first column; this yields how many columns there are."""
    n, n_window = tokens.shape
    with model.context(n_ctx=n * n_window, n_batch=n, n_ubatch=n, n_seq_max=n) as ctx:
        batch = StepBatch(n)
        try:
            for step in range(1, n_window):
                logits = batch.decode(ctx, tokens[:, step - 1], step - 1, model.n_vocab)
                tokens[:, step] = [draw(row, rng.random()) for row in logits]
                yield step + 1
        finally:
            batch.close()


def draw(logits: NDArray[np.float32], chance: float) -> int:
    """Return the token at which the cumulated probabilities of logits [n_vocab] pass `chance`."""
    weights = np.exp(logits - logits.max())
    starts = np.arange(0, weights.size, _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    wanted = chance * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), starts.size - 1)
    before = ends[block - 1] if block else 0.0
    within = np.cumsum(weights[starts[block] :][:_BLOCK], dtype=np.float64)
    offset = int(np.searchsorted(within, wanted - before, side="right"))
    return int(starts[block]) + min(offset, within.size - 1)


class StepBatch:
    """The next token of each of `n` sequences, all at one position."""

    def __init__(self, n: int) -> None:
        self._api = bindings()
        self._n = n
        self.raw = self._api.llama_batch_init(n, 0, 1)
        self.raw.n_tokens = n
        self._token = np.ctypeslib.as_array(self.raw.token, (n,))
        self._pos = np.ctypeslib.as_array(self.raw.pos, (n,))
        for row in range(n):
            self.raw.n_seq_id[row] = 1
            self.raw.seq_id[row][0] = row
            self.raw.logits[row] = True

    def fill(self, tokens: NDArray[np.int32], pos: int) -> None:
        """Put in the next token of each sequence."""
        self._token[:] = tokens
        self._pos[:] = pos

    def decode(
        self, ctx: object, tokens: NDArray[np.int32], pos: int, n_vocab: int
    ) -> NDArray[np.float32]:
        """Return the logits [n, n_vocab], which are valid until the next call. Raises PopError."""
        self.fill(tokens, pos)
        logs.forget_errors()
        code = self._api.llama_decode(ctx, self.raw)
        if code != 0:
            raise PopError(logs.first_error() or f"llama.cpp could not decode (code {code})")
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(ctx), (self._n, n_vocab))
        if np.isnan(logits.max(axis=1)).any():
            raise PopError(
                "the model's predictions are not numbers", "download it again: it may be damaged"
            )
        return logits

    def close(self) -> None:
        self._api.llama_batch_free(self.raw)
