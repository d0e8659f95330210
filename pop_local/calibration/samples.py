"""Text of the model's own, sampled at temperature 1, many sequences to a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from pop_local.base.errors import PopError
from pop_local.calibration.loaded import LoadedModel
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.batch import Outputs, TokenBatch

MAX_SEQUENCES = 64
# Two levels of sums: a whole cumulative sum over the vocabulary would cost as much as the rest.
_BLOCK = 256


def sample_windows(
    model: LoadedModel,
    starts: Sequence[Sequence[int]],
    n_window: int,
    *,
    seed: int,
    on_progress: Callable[[int, int], object],
) -> NDArray[np.int32]:
    """Sample sequences, int32 [len(starts), n_window], at temperature 1.

    Each goes on from its own start, a token at least, which is cut where it is too long.
    `on_progress(done, total)` counts tokens. Raises PopError when llama.cpp fails or its logits are
    no numbers.
    """
    rng = np.random.default_rng(seed)
    n_windows = len(starts)
    parts = []
    done, total = 0, n_windows * n_window
    # Batches of about equal size.
    for part in np.array_split(np.arange(n_windows), -(-n_windows // MAX_SEQUENCES)):
        n = len(part)
        tokens = np.empty((n, n_window), np.int32)
        given = [starts[number][:n_window] for number in part.tolist()]
        for row, start in zip(tokens, given, strict=True):
            row[: len(start)] = start
        for n_steps in _fill(tokens, [len(start) for start in given], model, rng):
            on_progress(done + n * n_steps, total)
        done += n * n_window
        parts.append(tokens)
    return np.concatenate(parts)


def _fill(
    tokens: NDArray[np.int32], n_given: Sequence[int], model: LoadedModel, rng: np.random.Generator
) -> Iterator[int]:
    """Sample all but the first `n_given` of each row; this yields how many columns there are."""
    n, n_window = tokens.shape
    opened = model.context(n_ctx=n * n_window, n_batch=n, n_ubatch=n, n_seq_max=n)
    with opened as ctx, closing(TokenBatch(n, is_step=True)) as batch:
        for step in range(1, n_window):
            logs.forget_errors()
            code = batch.decode(ctx, tokens[:, step - 1], step - 1, Outputs.ALL)
            if code != 0:
                raise logs.not_decoded(code)
            logits = np.ctypeslib.as_array(bindings().llama_get_logits(ctx), (n, model.n_vocab))
            if np.isnan(logits.max(axis=1)).any():
                raise PopError(
                    "the model's predictions are not numbers",
                    "download it again: it may be damaged",
                )
            for row, given in enumerate(n_given):
                if step >= given:
                    tokens[row, step] = draw(logits[row], rng.random())
            yield step + 1


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
