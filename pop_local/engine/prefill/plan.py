"""Choose the prompt rows that run in full, and the chunks to decode.

A row is full if its logits are requested, if its position is below `sink_tokens` or from
`full_from` on, or if it is a deep row by its token. Every other row stops at the boundary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from pop_converter.popfile.format import DeepRows, PopMeta
from pop_converter.popfile.pruning_plan import TAIL_TOKENS


class Reuse(StrEnum):
    """Cached rows that a prompt may reuse.

    OFF: none. EXACT: the rows of an equal beginning. EDITED: if prompts are pruned, also equal
    passages after an edit, whose K/V are approximate until a refill (see prefill.edit).
    """

    OFF = "off"
    EXACT = "exact"
    EDITED = "edited"


@dataclass(frozen=True)
class RowRule:
    """Rule for the prompt rows that run in full.

    These are the first `sink_tokens`, the last `tail_tokens`, the rows that `deep_rows` chooses by
    their tokens, and all rows of prompts shorter than `min_prompt`. `reuse`: cached rows that the
    prompt may reuse.
    """

    sink_tokens: int = 1
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int = 0
    deep_rows: DeepRows = DeepRows.NONE
    reuse: Reuse = Reuse.EDITED

    @classmethod
    def of(cls, meta: PopMeta | None) -> "RowRule":
        """Return the rule in a file's POP keys."""
        if meta is None:
            return cls()
        return cls(meta.sink_tokens, meta.tail_tokens, meta.min_prompt, meta.deep_rows)


# Rule in which only rows with logits are full.
NO_FULL_ROWS = RowRule(sink_tokens=0, tail_tokens=0)


@dataclass(frozen=True)
class PrefillPlan:
    """Plan for decoding a prompt's uncached tokens.

    `full_from`: first row of the tail. `chunks`: (start, end) offsets among the uncached
    tokens; each chunk is text or one image. `n_pruned`: number of rows that stop at the boundary
    in mode CONTEXT.
    """

    full_from: int
    chunks: tuple[tuple[int, int], ...]
    n_pruned: int


# (start, end) offsets of images among the uncached tokens.
Images = Sequence[tuple[int, int]]


def plan_prefill(
    n_past: int,
    n_tokens: int,
    rule: RowRule,
    n_batch: int,
    images: Images = (),
    deep: np.ndarray | None = None,
) -> PrefillPlan:
    """Plan the prefill of `n_tokens` (1 or more) after `n_past` cached tokens.

    `deep`: bool [n_tokens], the deep rows by token (None: no rows). `min_prompt` applies to the
    uncached tokens alone. The tail is text, so it starts after the last image.
    """
    end = n_past + n_tokens
    short = n_tokens < rule.min_prompt
    text_from = n_past + (images[-1][1] if images else 0)
    full_from = n_past if short else max(text_from, end - rule.tail_tokens)
    # The last row has logits, so it is full even without a tail.
    first_full = min(full_from, end - 1)
    first_pruned = max(n_past, rule.sink_tokens)
    n_deep = 0 if deep is None else int(deep[first_pruned - n_past : first_full - n_past].sum())
    return PrefillPlan(
        full_from=full_from,
        chunks=tuple(_chunks(n_tokens, full_from - n_past, n_batch, images)),
        n_pruned=max(0, first_full - first_pruned) - n_deep,
    )


def _chunks(
    n_tokens: int, tail_start: int, n_batch: int, images: Images
) -> Iterator[tuple[int, int]]:
    """Yield whole images, and text in chunks of up to `n_batch` tokens.

    A tail that fits one chunk is never split: each chunk with full rows reads the weights of the
    skipped layers.
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


def split_at(chunks: Sequence[tuple[int, int]], row: int) -> tuple[tuple[int, int], ...]:
    """Split the chunk that extends across a row of text, if any."""
    return tuple(
        piece
        for start, end in chunks
        for piece in ([(start, row), (row, end)] if start < row < end else [(start, end)])
    )
