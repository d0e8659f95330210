"""Which prompt rows run in full, and in which pieces a prompt is decoded.

A row is full if its logits are requested, if it is one of the first `sink_tokens`, at or past
`full_from`, or a deep row by its token. Every other row stops at the boundary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pop_converter.deep_row_criterion import DeepRows
from pop_converter.popfile.format import PopMeta
from pop_converter.popfile.pruning_plan import TAIL_TOKENS
from pop_local.engine.llama.batch import Outputs


@dataclass(frozen=True)
class RowRule:
    """Which rows of a prompt run all layers.

    The first `sink_tokens` and the last `tail_tokens` do, and all rows of prompts shorter than
    `min_prompt`. `deep_rows`: which others do because of their tokens. `reuses`: whether cached
    rows are reused.
    """

    sink_tokens: int = 1
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int = 0
    deep_rows: DeepRows = DeepRows.NONE
    reuses: bool = True

    @classmethod
    def of(cls, meta: PopMeta | None) -> "RowRule":
        """Return the rule that a file's keys state."""
        if meta is None:
            return cls()
        return cls(meta.sink_tokens, meta.tail_tokens, meta.min_prompt, meta.deep_rows)


# Only rows whose logits are requested: where rows leave exactly, or get their depth later.
NO_ENDS = RowRule(sink_tokens=0, tail_tokens=0)
NOWHERE = 2**31 - 1


@dataclass(frozen=True)
class PrefillPlan:
    """How the tokens of a prompt that are not cached are decoded.

    `full_from` is a row, `text_from` the one after the last image. `chunks` are (start, end)
    offsets among the tokens to decode, of text or of one image. `n_pruned` rows stop at the
    boundary in mode CONTEXT.
    """

    text_from: int
    full_from: int
    chunks: tuple[tuple[int, int], ...]
    n_pruned: int


# (start, end) offsets of the images in a prompt.
Images = Sequence[tuple[int, int]]


def plan_prefill(
    n_past: int,
    n_tokens: int,
    rule: RowRule,
    n_batch: int,
    images: Images = (),
    deep: np.ndarray | None = None,
) -> PrefillPlan:
    """Plan the prefill of `n_tokens` (at least 1) after `n_past` cached ones.

    `deep`: bool [n_tokens], the rows that run deep because of their tokens; None for no such rows.

    Only the tokens to decode count as the prompt here: what is cached stays as it was computed.
    The tail is text: it begins after the last image.
    """
    end = n_past + n_tokens
    short = n_tokens < rule.min_prompt
    text_from = n_past + (images[-1][1] if images else 0)
    full_from = n_past if short else max(text_from, end - rule.tail_tokens)
    # The last row asks for logits, so it is full whatever the tail.
    first_full = min(full_from, end - 1)
    first_pruned = max(n_past, rule.sink_tokens)
    n_deep = 0 if deep is None else int(deep[first_pruned - n_past : first_full - n_past].sum())
    return PrefillPlan(
        text_from=text_from,
        full_from=full_from,
        chunks=tuple(_chunks(n_tokens, full_from - n_past, n_batch, images)),
        n_pruned=max(0, first_full - first_pruned) - n_deep,
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
    """Return which rows are full in mode CONTEXT by position or logits: bool [n_rows]."""
    full: np.ndarray = (positions < rule.sink_tokens) | (positions >= full_from)
    full |= outputs is Outputs.ALL
    full[-1] |= outputs is Outputs.LAST
    return full
