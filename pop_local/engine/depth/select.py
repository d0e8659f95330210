"""Which context rows a question needs: those that it attends to, and those that share its words.

The algorithm is this project's (docs/depth.md). One score is the question's attention by head,
over what all rows pay to the same row. The other is rare tokens of the question. Each is spread
over its neighbourhood.
"""

from collections.abc import Sequence

import numpy as np

# A row's score reaches the rows behind it, where what it announces stands, and a few before it.
N_BEHIND = 16
N_BEFORE = 3


def select_rows(
    scores: np.ndarray, tokens: np.ndarray, question: Sequence[int], may_be: np.ndarray, n: int
) -> np.ndarray:
    """Choose up to `n` rows; returns their positions, ascending.

    `scores`: float [n_rows], the attention paid by the question to each row of the cache. `tokens`:
    [n_rows], theirs. `question`: its tokens, without control tokens. `may_be`: bool [n_rows], the
    rows that can be chosen. Half of them are chosen by attention, half by words; where the question
    shares none, all by attention.
    """
    by_attention = spread(scores)
    by_words = spread(word_scores(tokens, question))
    chosen = best_rows(by_attention, may_be, n - n // 2)
    left = may_be.copy()
    left[chosen] = False
    shared = best_rows(by_words, left & (by_words > 0), n // 2)
    left[shared] = False
    rest = best_rows(by_attention, left, n - len(chosen) - len(shared))
    return np.sort(np.concatenate([chosen, shared, rest]))


def best_rows(scores: np.ndarray, may_be: np.ndarray, n: int) -> np.ndarray:
    """Return the positions of the `n` largest scores where `may_be`, ascending.

    Where scores are equal, the earlier row is taken.
    """
    positions = np.flatnonzero(may_be)
    return np.sort(positions[np.argsort(-scores[positions], kind="stable")[:n]])


def spread(scores: np.ndarray) -> np.ndarray:
    """Give each row the largest score from N_BEHIND rows before it to N_BEFORE behind it."""
    if not len(scores):
        return scores
    padded = np.pad(scores, (N_BEHIND, N_BEFORE), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_BEHIND + N_BEFORE + 1)
    result: np.ndarray = windows.max(axis=1)
    return result


def word_scores(tokens: np.ndarray, question: Sequence[int]) -> np.ndarray:
    """Return, for each token, 1 over how often it stands there; 0 if it is not in the question."""
    _, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    result: np.ndarray = np.isin(tokens, question) / counts[inverse]
    return result
