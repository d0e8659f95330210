"""Which context rows a question needs: those that it attends to, and those that share its words.

The algorithm is this project's (docs/depth.md): attention of the question by head, over what all
rows pay to the same row, and rare tokens of the question, each spread over its neighbourhood.
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
    n = min(n, int(may_be.sum()))
    by_attention = np.where(may_be, spread(scores), -np.inf)
    by_words = np.where(may_be, spread(word_scores(tokens, question)), 0.0)
    chosen = _best(by_attention, n - n // 2)
    by_words[chosen] = 0.0
    shared = _best(by_words, n // 2)
    chosen = np.concatenate([chosen, shared[by_words[shared] > 0]])
    by_attention[chosen] = -np.inf
    return np.sort(np.concatenate([chosen, _best(by_attention, n - len(chosen))]))


def spread(scores: np.ndarray) -> np.ndarray:
    """Give each row the largest score from N_BEHIND rows before it to N_BEFORE behind it."""
    padded = np.pad(scores, (N_BEHIND, N_BEFORE), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_BEHIND + N_BEFORE + 1)
    result: np.ndarray = windows.max(axis=1)
    return result


def word_scores(tokens: np.ndarray, question: Sequence[int]) -> np.ndarray:
    """Return, for each token, 1 over how often it stands there; 0 if it is not in the question."""
    _, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    result: np.ndarray = np.isin(tokens, question) / counts[inverse]
    return result


def _best(scores: np.ndarray, n: int) -> np.ndarray:
    """Positions of the `n` largest scores, the earlier ones first where they are equal."""
    return np.argsort(-scores, kind="stable")[:n]
