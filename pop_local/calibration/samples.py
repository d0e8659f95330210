"""Text of the model's own, sampled at temperature 1, many sequences to a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import PopError
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch
from pop_local.engine.llama.context import Context

MAX_SEQUENCES = 64
NOT_SAMPLED = -1
# Tokens at once of what was sampled before a stop.
_READ_AGAIN = 128
# Two levels of sums: a whole cumulative sum over the vocabulary would cost as much as the rest.
_BLOCK = 256


def sample_windows(
    context: Context,
    windows: NDArray[np.int32],
    n_given: Sequence[int],
    *,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> None:
    """Sample what is NOT_SAMPLED of sequences, int32 [n_windows, n_window], at temperature 1.

    `n_given`: how many tokens each was begun with, one at least. After a stop the samples so far
    are read again, and the sampling goes on with the chances that it would have had.
    `on_progress(done, total)` counts tokens. Raises PopError when llama.cpp fails or its logits are
    no numbers.
    """
    rng = np.random.default_rng(seed)
    done = 0
    # Batches of about equal size.
    n_parts = -(-len(windows) // MAX_SEQUENCES)
    parts = np.array_split(windows, n_parts), np.array_split(np.array(n_given), n_parts)
    for tokens, given in zip(*parts, strict=True):
        for n_steps in _fill(tokens, given, context, rng):
            on_progress(done + len(tokens) * n_steps, windows.size)
        done += tokens.size


def _fill(
    tokens: NDArray[np.int32],
    n_given: NDArray[Any],
    context: Context,
    rng: np.random.Generator,
) -> Iterator[int]:
    """Sample what is missing of each row; this yields how many columns there are."""
    n, n_window = tokens.shape
    n_known = int(np.append((tokens == NOT_SAMPLED).any(axis=0), True).argmax())
    rng.random(int(np.maximum(n_known - n_given, 0).sum()))  # as many as were drawn for them
    if n_known == n_window:
        return
    n_batch = n if n_known == 1 else max(n, _READ_AGAIN)
    shape = {"n_ctx": n * n_window, "n_batch": n_batch, "n_ubatch": n_batch, "n_seq_max": n}
    with context.another(**shape) as ctx, closing(TokenBatch(n_batch)) as batch:
        for sequence, row in enumerate(tokens[:, : n_known - 1]):
            for start in range(0, len(row), n_batch):
                piece = row[start : start + n_batch]
                logs.forget_errors()
                _require(batch.decode(ctx, piece, start, Outputs.NONE, sequence))
            yield n_known
        for step in range(n_known, n_window):
            logs.forget_errors()
            at = (np.full(n, step - 1), np.arange(n), np.ones(n, bool))
            _require(batch.run(ctx, tokens[:, step - 1], *at))
            logits = np.ctypeslib.as_array(bindings().llama_get_logits(ctx), (n, context.n_vocab))
            if np.isnan(logits.max(axis=1)).any():
                raise PopError(
                    "the model's predictions are not numbers",
                    "download it again: it may be damaged",
                )
            for row, given in enumerate(n_given):
                if step >= given:
                    tokens[row, step] = draw(logits[row], rng.random())
            yield step + 1


def _require(code: int) -> None:
    if code != 0:
        raise logs.not_decoded(code)


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
