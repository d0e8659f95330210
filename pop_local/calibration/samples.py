"""Sample text from the model at temperature 1, in batches of many sequences."""

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
# Batch size for reading the existing samples again after a stop.
_READ_AGAIN = 128
# Block size of a two-level sum, since a full cumulative sum over the vocabulary would double the
# time.
_BLOCK = 256


def sample_windows(
    context: Context,
    windows: NDArray[np.int32],
    n_given: Sequence[int],
    *,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> None:
    """Replace the NOT_SAMPLED tokens in sequences, int32 [n_windows, n_window], by samples.

    `n_given`: the number of given tokens at the start of each sequence, one or more. After a stop,
    a further call continues with the same random numbers. `on_progress(done, total)` counts tokens.
    Raises PopError if llama.cpp fails or its logits are NaN.
    """
    rng = np.random.default_rng(seed)
    done = 0
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
    """Sample the missing tokens column by column, and yield the number of complete columns."""
    n, n_window = tokens.shape
    n_known = int(np.append((tokens == NOT_SAMPLED).any(axis=0), True).argmax())
    # Skip the random numbers that an earlier call used.
    rng.random(int(np.maximum(n_known - n_given, 0).sum()))
    if n_known == n_window:
        return
    n_batch = n if n_known == 1 else max(n, _READ_AGAIN)
    shape = {"n_ctx": n * n_window, "n_batch": n_batch, "n_ubatch": n_batch, "n_seq_max": n}
    with context.extra_context(**shape) as ctx, closing(TokenBatch(n_batch)) as batch:
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
            logits = np.ctypeslib.as_array(
                bindings().llama_get_logits(ctx), (n, context.vocabulary.n_tokens)
            )
            if np.isnan(logits.max(axis=1)).any():
                raise PopError(
                    "the model predicts NaN",
                    "the model file may be damaged: download it again",
                )
            for row, given in enumerate(n_given):
                if step >= given:
                    tokens[row, step] = draw(logits[row], rng.random())
            yield step + 1


def _require(code: int) -> None:
    if code != 0:
        raise logs.not_decoded(code)


def draw(logits: NDArray[np.float32], chance: float) -> int:
    """Return the first token whose cumulative probability exceeds `chance`; logits [n_vocab]."""
    weights = np.exp(logits - logits.max())
    starts = np.arange(0, weights.size, _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    wanted = chance * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), starts.size - 1)
    before = ends[block - 1] if block else 0.0
    within = np.cumsum(weights[starts[block] :][:_BLOCK], dtype=np.float64)
    offset = int(np.searchsorted(within, wanted - before, side="right"))
    return int(starts[block]) + min(offset, within.size - 1)
