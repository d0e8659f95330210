"""Which prompt rows run in full, in which pieces a prompt is decoded, what it may reuse.

The backend's rule, by position: a row is full if its logits are requested, or it is one of the
first `sink_tokens`, or it is at or past `full_from`; every other row stops at the boundary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pop_converter.popfile.plan import TAIL_TOKENS
from pop_local.engine.llama.batch import Outputs


@dataclass(frozen=True)
class RowRule:
    """How many tokens at the two ends of a prompt are full; shorter prompts are full altogether."""

    sink_tokens: int = 1
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int = 0


# Only rows whose logits are requested: where rows leave exactly, or get their depth later.
NO_ENDS = RowRule(sink_tokens=0, tail_tokens=0)
NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class PrefillPlan:
    """A prompt of which `n_tokens` are to be decoded after those that are cached.

    `full_from` is a row, `text_from` the one after the last image; `chunks` are (start, end)
    offsets among the tokens to decode, of text or of one image; `n_pruned` rows stop at the
    boundary when the mode is CONTEXT.
    """

    n_tokens: int
    text_from: int
    full_from: int
    chunks: tuple[tuple[int, int], ...]
    n_pruned: int


# (start, end) offsets of the images in a prompt.
Images = Sequence[tuple[int, int]]


def plan_prefill(
    n_past: int, n_tokens: int, rule: RowRule, n_batch: int, images: Images = ()
) -> PrefillPlan:
    """Plan the prefill of `n_tokens` (at least 1) after `n_past` cached ones.

    Only the tokens to decode count as the prompt here: what is cached stays as it was computed.
    The tail is text: it begins after the last image.
    """
    end = n_past + n_tokens
    short = n_tokens < rule.min_prompt
    text_from = n_past + (images[-1][1] if images else 0)
    full_from = n_past if short else max(text_from, end - rule.tail_tokens)
    # The last row asks for logits, so it is full whatever the tail.
    first_full = min(full_from, end - 1)
    return PrefillPlan(
        n_tokens=n_tokens,
        text_from=text_from,
        full_from=full_from,
        chunks=tuple(_chunks(n_tokens, full_from - n_past, n_batch, images)),
        n_pruned=max(0, first_full - max(n_past, rule.sink_tokens)),
    )


def _chunks(
    n_tokens: int, tail_start: int, n_batch: int, images: Images
) -> Iterator[tuple[int, int]]:
    """Images as they are; of text pieces of `n_batch`, cut so that a tail that fits one piece is
    never spread over two.

    Each piece with full rows costs a pass over the weights of the skipped layers.
    """
    at = 0
    for start, end in [*images, (n_tokens, n_tokens)]:
        cuts = list(range(at, start, n_batch))
        if cuts and start - tail_start <= n_batch and at < tail_start < cuts[-1]:
            cuts[-1] = tail_start
        yield from zip(cuts, [*cuts[1:], start][: len(cuts)], strict=True)
        if start < end:
            yield start, end
        at = end


def full_rows(positions: np.ndarray, rule: RowRule, full_from: int, outputs: Outputs) -> np.ndarray:
    """Tell which rows, by their positions, are full in mode CONTEXT.

    Those of `outputs` are decoded with logits.
    """
    full: np.ndarray = (positions < rule.sink_tokens) | (positions >= full_from)
    full |= outputs is Outputs.ALL
    full[-1] |= outputs is Outputs.LAST
    return full


def images_in(tokens: Sequence[int], n_rows: Callable[[Sequence[int]], int]) -> Images:
    """Find the images of a prompt: ids below zero; `n_rows` says of how many one begins."""
    ids = np.asarray(tokens, dtype=np.int64)
    found: list[tuple[int, int]] = []
    for start in np.flatnonzero(ids < 0).tolist():
        if not found or start >= found[-1][1]:
            found.append((start, start + n_rows(tokens[start:])))
    return found


def text_from(tokens: Sequence[int]) -> int:
    """Return where the text after a prompt's last image begins."""
    rows = np.flatnonzero(np.asarray(tokens, dtype=np.int64) < 0)
    return int(rows[-1]) + 1 if rows.size else 0


def n_usable(tokens: Sequence[int], cached: np.ndarray, is_full: np.ndarray, rule: RowRule) -> int:
    """How many cached rows the prompt `tokens` may reuse.

    As many as it begins with, but no context row where the prompt's own tail must be full.
    """
    n_same = n_equal(tokens, cached)
    tail_start = max(text_from(tokens), len(tokens) - rule.tail_tokens)
    pruned = np.flatnonzero(~is_full[tail_start:n_same])
    return tail_start + int(pruned[0]) if pruned.size else n_same


def n_equal(tokens: Sequence[int], cached: np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(tokens), len(cached))
    differ = np.flatnonzero(cached[:n] != np.asarray(tokens[:n], dtype=np.intc))
    return int(differ[0]) if differ.size else n
