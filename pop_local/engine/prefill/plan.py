"""Which prompt rows run in full, and in which pieces a prompt is decoded.

The backend's rule, by position: a row is full if its logits are requested, or it is one of the
first `sink_tokens`, or it is at or past `full_from`; every other row stops at the boundary.
"""

from dataclasses import dataclass

from converter.plan import TAIL_TOKENS


@dataclass(frozen=True)
class RowRule:
    """How many tokens at the two ends of a prompt are full; shorter prompts are full altogether."""

    sink_tokens: int = 1
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int = 0


# Only the row whose logits are requested; nothing is lost, so no prompt is too short.
EXACT_RULE = RowRule(sink_tokens=0, tail_tokens=0)


@dataclass(frozen=True)
class PrefillPlan:
    """A prompt of which `n_past` tokens are cached and `n_tokens` are to be decoded.

    `full_from` is a position; `chunks` are (start, end) offsets among the tokens to decode;
    `n_pruned` rows stop at the boundary when the mode is CONTEXT, and `n_full` do not.
    """

    n_past: int
    n_tokens: int
    full_from: int
    chunks: tuple[tuple[int, int], ...]
    n_pruned: int

    @property
    def n_full(self) -> int:
        return self.n_tokens - self.n_pruned


def plan_prefill(n_past: int, n_tokens: int, rule: RowRule, n_batch: int) -> PrefillPlan:
    """Plan the prefill of `n_tokens` (at least 1) after `n_past` cached ones.

    Only the tokens to decode count as the prompt here: what is cached stays as it was computed.
    """
    end = n_past + n_tokens
    short = n_tokens < rule.min_prompt
    full_from = n_past if short else max(n_past, end - rule.tail_tokens)
    # The last row asks for logits, so it is full whatever the tail.
    first_full = min(full_from, end - 1)
    return PrefillPlan(
        n_past=n_past,
        n_tokens=n_tokens,
        full_from=full_from,
        chunks=_chunks(n_tokens, full_from - n_past, n_batch),
        n_pruned=max(0, first_full - max(n_past, rule.sink_tokens)),
    )


def _chunks(n_tokens: int, tail_start: int, n_batch: int) -> tuple[tuple[int, int], ...]:
    """Pieces of `n_batch`, cut so that a tail that fits one piece is never spread over two.

    Each piece with full rows costs a pass over the weights of the skipped layers.
    """
    starts = list(range(0, n_tokens, n_batch))
    if n_tokens - tail_start <= n_batch and starts[-1] > tail_start:
        starts[-1] = tail_start
    return tuple(zip(starts, [*starts[1:], n_tokens], strict=True))
