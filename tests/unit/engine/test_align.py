"""Alignment of edited prompts, compared with a brute-force reference."""

import os
import random
from itertools import pairwise

import numpy as np
import pytest

from pop_local.engine.cache.align import MIN_RUN, TokenRun, find_runs, in_order, window_hashes

N_EDITS = int(os.environ.get("ALIGN_EDITS", "2000"))


def reference(cached: list[int], prompt: list[int], min_run: int) -> list[TokenRun]:
    """Return the longest run at each prompt row, by comparing all pairs of rows."""
    runs, at = [], 0
    while at < len(prompt):
        best = TokenRun(0, at, 0)
        for start in range(len(cached)):
            n = 0
            while (
                start + n < len(cached)
                and at + n < len(prompt)
                and cached[start + n] == prompt[at + n]
            ):
                n += 1
            if n > best.n:
                best = TokenRun(start, at, n)
        if best.n >= min_run:
            runs.append(best)
        at += best.n if best.n >= min_run else 1
    return runs


def edited(rng: random.Random, tokens: list[int]) -> list[int]:
    """Return the tokens after one to four random edits."""
    tokens = list(tokens)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(tokens) + 1)
        end = min(len(tokens), start + rng.randrange(30))
        kind = rng.randrange(4)
        if kind == 0:
            tokens[start:end] = []
        elif kind == 1:
            tokens[start:start] = [rng.randrange(1000) for _ in range(rng.randrange(20))]
        elif kind == 2:
            tokens[start:end] = [rng.randrange(1000) for _ in range(end - start)]
        else:
            piece, tokens[start:end] = tokens[start:end], []
            at = rng.randrange(len(tokens) + 1)
            tokens[at:at] = piece
    return tokens


def runs_of(cached: list[int], prompt: list[int], min_run: int) -> list[TokenRun]:
    tokens = np.array(prompt, np.int32)
    hashes = window_hashes(tokens, min_run)
    return find_runs(np.array(cached, np.int32), tokens, hashes, min_run)


@pytest.mark.parametrize("n_distinct", [3, 1000])
def test_runs_equal_the_reference(n_distinct):
    rng = random.Random(n_distinct)
    for _ in range(N_EDITS // 2):
        cached = [rng.randrange(n_distinct) for _ in range(rng.randrange(80))]
        prompt = edited(rng, cached)
        min_run = rng.choice([4, 8, 16])
        runs, expected = runs_of(cached, prompt, min_run), reference(cached, prompt, min_run)
        for run in runs:
            rows = cached[run.cached : run.cached + run.n]
            assert run.n >= min_run and rows == prompt[run.prompt : run.prompt + run.n]
        assert all(run.prompt + run.n <= later.prompt for run, later in pairwise(runs))
        if n_distinct > 100:  # else a run can have several equally good places
            assert runs == expected


def test_repeated_text_takes_linear_time():
    tokens = [7] * 200_000
    assert runs_of(tokens, tokens, MIN_RUN) == [TokenRun(0, 0, 200_000)]


def test_short_inputs_have_no_runs():
    for tokens, prompt in (([], [1, 2]), ([1, 2], []), ([1, 2, 3], [1, 2, 3])):
        assert runs_of(tokens, prompt, 4) == []


def test_largest_part_in_order_is_kept():
    first, moved, last = TokenRun(0, 0, 100), TokenRun(300, 100, 50), TokenRun(100, 150, 200)
    assert in_order([first, moved, last]) == [first, last]
    assert in_order([moved]) == [moved]
    assert in_order([]) == []
    twice = [TokenRun(0, 0, 100), TokenRun(40, 100, 60), TokenRun(100, 160, 50)]
    assert in_order(twice) == [twice[0], twice[2]]
