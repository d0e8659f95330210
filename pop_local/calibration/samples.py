"""Sample text from a model at temperature 1, with many sequences in each batch."""

from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from pop_converter.base.errors import PopError
from pop_converter.base.progress import Progress
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import TokenBatch
from pop_local.engine.llama.context import Context

MAX_SEQUENCES = 64
# Block size of a two-level sum. A full cumulative sum over the vocabulary takes twice as long.
_BLOCK = 256


def sample_windows(
    context: Context,
    starts: Sequence[Sequence[int]],
    n_window: int,
    *,
    seed: int,
    on_progress: Progress,
) -> NDArray[np.int32]:
    """Continue each start, one token or more, to `n_window` tokens by sampling from the model.

    Return the tokens, [len(starts), n_window]. `on_progress` counts tokens. Raises PopError if
    llama.cpp fails or its logits are NaN.
    """
    rng = np.random.default_rng(seed)
    windows = np.zeros((len(starts), n_window), np.int32)
    for window, start in zip(windows, starts, strict=True):
        window[: len(start)] = start
    n_given = np.array([len(start) for start in starts])
    done = 0
    n_parts = -(-len(windows) // MAX_SEQUENCES)
    parts = np.array_split(windows, n_parts), np.array_split(n_given, n_parts)
    for tokens, given in zip(*parts, strict=True):
        for n_steps in _fill(tokens, given, context, rng):
            on_progress(done + len(tokens) * n_steps, windows.size)
        done += tokens.size
    return windows


def _fill(
    tokens: NDArray[np.int32],
    n_given: NDArray[np.int64],
    context: Context,
    rng: np.random.Generator,
) -> Iterator[int]:
    """Sample the tokens [n, n_window] after each row's first `n_given` tokens, column by column.

    Yield the number of complete columns after each step.
    """
    n, n_window = tokens.shape
    shape = {"n_ctx": n * n_window, "n_batch": n, "n_ubatch": n, "n_seq_max": n}
    with context.extra_context(**shape) as ctx, closing(TokenBatch(n)) as batch:
        for step in range(1, n_window):
            logs.forget_errors()
            at = (np.full(n, step - 1), np.arange(n), np.ones(n, bool))
            if code := batch.run(ctx, tokens[:, step - 1], *at):
                raise logs.not_decoded(code)
            logits = np.ctypeslib.as_array(
                bindings().llama_get_logits(ctx), (n, context.vocabulary.n_tokens)
            )
            if np.isnan(logits.max(axis=1)).any():
                raise PopError(
                    "the model predicts NaN",
                    "the model file may be damaged: download it again",
                )
            for row in np.flatnonzero(n_given <= step):
                tokens[row, step] = draw(logits[row], rng.random())
            yield step + 1


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
