"""Choose which prompt rows run through all layers, and split the prompt into chunks for decoding.

A row is full if it is a deep row or needs logits. Rows before position `sink_tokens` and rows from
position `full_from` onward are also full. All other rows stop at the boundary layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from pop_converter.popfile.format import DeepRows, PopMeta
from pop_converter.popfile.pruning_plan import TAIL_TOKENS


class Reuse(str, Enum):
    """Cached rows that a prompt may reuse.

    OFF: none. EXACT reuses the common prefix. When pruning is on, EDITED also reuses matching
    passages after an edit. Reused passages have approximate K/V until a refill (see prefill.edit).
    """

    OFF = "off"
    EXACT = "exact"
    EDITED = "edited"


@dataclass(frozen=True)
class RowRule:
    """A rule for selecting the prompt rows that run through all layers.

    The rule selects the first `sink_tokens` rows, the last `tail_tokens` rows, and the rows whose
    tokens meet the `deep_rows` criterion. Prompts shorter than `min_prompt` are not pruned.
    """

    sink_tokens: int = 1
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int = 0
    deep_rows: DeepRows = DeepRows.NONE
    reuse: Reuse = Reuse.EDITED

    @classmethod
    def of(cls, meta: PopMeta | None) -> "RowRule":
        """Return the rule stored in a file's POP keys."""
        if meta is None:
            return cls()
        return cls(meta.sink_tokens, meta.tail_tokens, meta.min_prompt, meta.deep_rows)


# Rule under which only rows with logits are full.
NO_FULL_ROWS = RowRule(sink_tokens=0, tail_tokens=0)


@dataclass(frozen=True)
class PrefillPlan:
    """A plan for decoding a prompt's uncached tokens.

    `full_from`: first row of the tail. `chunks`: (start, end) ranges of uncached tokens, each with
    text or a single image. `n_pruned`: number of rows that stop at the boundary in CONTEXT mode.
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
    """Plan the prefill of `n_tokens` tokens (1 or more) after `n_past` cached tokens.

    `deep`: a mask of the deep rows, bool [n_tokens] (default: no rows). `min_prompt` applies only
    to the uncached tokens. The tail contains only text, so it starts after the last image.
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
    """Yield one chunk per image, and chunks of up to `n_batch` tokens for the text.

    A tail that fits in one chunk is not split. Otherwise, the model would read the skipped layers'
    weights twice.
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
    """If `row` is inside a chunk of text, split the chunk before that row."""
    return tuple(
        piece
        for start, end in chunks
        for piece in ([(start, row), (row, end)] if start < row < end else [(start, end)])
    )
