"""Sample text from a model at temperature 1, with many sequences in each batch."""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from pop_base.errors import PopError
from pop_base.progress import Progress
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
    """Extend each sequence in `starts` to `n_window` tokens by sampling from the model.

    Returns the tokens as an array [len(starts), n_window]. Progress is reported in tokens. Raises
    PopError if llama.cpp fails or returns NaN logits.
    """
    rng = np.random.default_rng(seed)
    windows = np.zeros((len(starts), n_window), np.int32)
    for window, start in zip(windows, starts, strict=True):
        window[: len(start)] = start
    n_given = np.array([len(start) for start in starts])
    done = 0
    for part in np.array_split(np.arange(len(starts)), -(-len(starts) // MAX_SEQUENCES)):
        n = len(part)
        sizes = {"n_ctx": n * n_window, "n_batch": n, "n_ubatch": n, "n_seq_max": n}
        with context.extra_context(**sizes) as ctx, closing(TokenBatch(n)) as batch:
            for step in range(1, n_window):
                logs.forget_errors()
                at = (np.full(n, step - 1), np.arange(n), np.ones(n, bool))
                if code := batch.run(ctx, windows[part, step - 1], *at):
                    raise logs.not_decoded(code)
                logits = np.ctypeslib.as_array(
                    bindings().llama_get_logits(ctx), (n, context.vocabulary.n_tokens)
                )
                if np.isnan(logits.max(axis=1)).any():
                    raise PopError(
                        "the model returned NaN logits",
                        "download the model again: its file may be damaged",
                    )
                for number in np.flatnonzero(n_given[part] <= step):
                    windows[part[number], step] = draw(logits[number], rng.random())
                on_progress(done + n * (step + 1), windows.size)
        done += n * n_window
    return windows


def draw(logits: NDArray[np.float32], chance: float) -> int:
    """Return the first token whose cumulative probability exceeds `chance`. `logits`: [n_vocab]."""
    weights = np.exp(logits - logits.max())
    starts = np.arange(0, weights.size, _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    threshold = chance * ends[-1]
    block = min(int(np.searchsorted(ends, threshold, side="right")), starts.size - 1)
    before = ends[block - 1] if block else 0.0
    within = np.cumsum(weights[starts[block] :][:_BLOCK], dtype=np.float64)
    offset = int(np.searchsorted(within, threshold - before, side="right"))
    return int(starts[block]) + min(offset, within.size - 1)
