"""Reuse of cached rows by an edited prompt: a changed, inserted or removed passage.

Rows after the first change keep their K/V and move to their new positions. These rows are stale:
they were computed after another text. Only new tokens and the prompt's tail are decoded, and a
refill decodes the stale rows again later.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pop_local.engine.cache.align import find_runs, in_order
from pop_local.engine.cache.prompt_cache import CountReusable
from pop_local.engine.prompt.prompt import Prompt

# An edit must reuse this many rows more than the common prefix has, or it saves too little time.
MIN_REUSED = 256


@dataclass(frozen=True)
class Edit:
    """An edited prompt's rows.

    `sources`: int32 [n_prompt], the cached row with each token's K/V, or -1 for rows to decode.
    """

    sources: NDArray[np.int32]

    @property
    def n_reused(self) -> int:
        return int((self.sources >= 0).sum())

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) rows of each range to decode."""
        is_gap = np.concatenate([[False], self.sources < 0, [False]])
        edges = np.flatnonzero(is_gap[1:] != is_gap[:-1]).tolist()
        yield from zip(edges[::2], edges[1::2], strict=True)


def find_edit(cached: np.ndarray, prompt: np.ndarray) -> Edit:
    """Return which cached rows have the prompt's tokens. `cached`, `prompt`: int [n]."""
    sources = np.full(len(prompt), -1, np.int32)
    # Rows of passages in another order would lose more than pruning does (docs/quality.md).
    for run in in_order(find_runs(cached, prompt)):
        sources[run.prompt : run.prompt + run.n] = np.arange(run.cached, run.cached + run.n)
    n = min(len(cached), len(prompt))
    n_same = int(np.append(cached[:n] != prompt[:n], True).argmax())
    sources[:n_same] = np.arange(n_same)
    return Edit(sources)


def pays(n_reused: int, n_prefix: int, n_prompt: int) -> bool:
    """Return whether reusing rows of an edited prompt beats reusing the common prefix alone."""
    return n_reused >= n_prefix + MIN_REUSED and 2 * n_reused >= n_prompt


def count_edited(prompt: Prompt) -> CountReusable:
    """Return a function that counts the rows that a prompt can reuse by an edit or as a prefix."""
    tokens = np.asarray(prompt.tokens, np.int32)

    def count(cached: np.ndarray, images: Mapping[int, str]) -> int:
        n_prefix = prompt.n_equal(cached, images)
        n_most = min(len(cached), len(tokens))
        if images or prompt.images or not pays(n_most, n_prefix, len(tokens)):
            return n_prefix
        n_reused = find_edit(cached, tokens).n_reused
        return n_reused if pays(n_reused, n_prefix, len(tokens)) else n_prefix

    return count
