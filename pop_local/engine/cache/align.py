"""Find the runs of tokens that an edited prompt shares with the cached tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

# Shorter runs are read again, because their K/V depend mostly on the tokens around them.
MIN_RUN = 32
# Repeated text matches in many places. Comparing only a few matches bounds the search time.
_MAX_CANDIDATES = 8
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers are invertible modulo 2^64
_COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class TokenRun:
    """A run of `n` tokens that starts at cache row `cached` and at prompt row `prompt`."""

    cached: int
    prompt: int
    n: int


def n_leading(flags: np.ndarray) -> int:
    """Return the number of leading True values."""
    return int(np.append(~flags, True).argmax())


def window_hashes(tokens: np.ndarray, n: int) -> NDArray[np.uint64]:
    """Return the hash of each window of `n` tokens: uint64 [max(0, n_tokens - n + 1)]."""
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    powers = np.array([pow(_HASH_BASE, i, 2**64) for i in range(n)], dtype=np.uint64)
    windows = sliding_window_view(tokens.astype(np.uint64), n)
    hashes: NDArray[np.uint64] = windows @ powers
    return hashes


def find_runs(
    cached: np.ndarray,
    prompt: np.ndarray,
    prompt_hashes: NDArray[np.uint64],
    min_run: int = MIN_RUN,
) -> list[TokenRun]:
    """Return the runs of `min_run` or more matching tokens, in prompt order.

    `cached`, `prompt`: int [n]. `prompt_hashes`: the prompt's `window_hashes` for windows of
    `min_run` tokens. Each prompt token is in at most one run. A cached token can be in multiple
    runs. In the cache, the runs need not be in prompt order. Takes O(n log n) time.
    """
    cached_hashes = window_hashes(cached, min_run)
    order = np.argsort(cached_hashes, kind="stable")
    ordered = cached_hashes[order]
    hits = np.flatnonzero(np.isin(prompt_hashes, ordered))
    runs: list[TokenRun] = []
    at = 0
    while (next_hit := int(np.searchsorted(hits, at))) < len(hits):
        row = int(hits[next_hit])
        first, last = (
            int(np.searchsorted(ordered, prompt_hashes[row], side=side))
            for side in ("left", "right")
        )
        candidates = order[first : min(last, first + _MAX_CANDIDATES)].tolist()
        matches = (TokenRun(c, row, _n_equal(cached[c:], prompt[row:])) for c in candidates)
        run = max(matches, key=lambda match: match.n)
        at = row + 1
        if run.n >= min_run:  # otherwise two different windows have the same hash
            runs.append(run)
            at = row + run.n
    return runs


def in_order(runs: Sequence[TokenRun]) -> list[TokenRun]:
    """Return the subset of `runs` that is in cache order and covers the most tokens."""
    best: list[tuple[int, int]] = []  # for each run: tokens up to its end, and the previous run
    for at, run in enumerate(runs):
        before = [
            (best[other][0], other)
            for other in range(at)
            if runs[other].cached + runs[other].n <= run.cached
        ]
        n_before, previous = max(before, default=(0, -1))
        best.append((n_before + run.n, previous))
    path: list[TokenRun] = []
    at = max(range(len(runs)), key=lambda run_index: best[run_index][0], default=-1)
    while at >= 0:
        path.append(runs[at])
        at = best[at][1]
    return path[::-1]


def _n_equal(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    for start in range(0, n, _COMPARED_AT_ONCE):
        end = min(start + _COMPARED_AT_ONCE, n)
        differ = np.flatnonzero(a[start:end] != b[start:end])
        if differ.size:
            return start + int(differ[0])
    return n
