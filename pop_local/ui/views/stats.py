"""The figures of answers, as lines."""

from collections.abc import Callable, Iterator, Sequence

from pop_local.engine.turn import TurnStats
from pop_local.measure.full_cost import FullCost

ENDINGS = {"stop": "", "length": " · cut off at the token limit", "interrupted": " · stopped"}


def stats_line(stats: TurnStats) -> str:
    """Prompt tokens (of which cached and pruned), TTFT, prefill and decode tokens per second.

    A prompt that was read in full although pruning is on is said to be short.
    """
    cached = f"{stats.n_cached:,} cached, " if stats.n_cached else ""
    return (
        f"prompt {stats.n_prompt:,} tokens ({cached}{stats.left})"
        f" · TTFT {stats.ttft_s:.2f} s"
        f" · prefill {stats.prefill_tokens_per_s:,.0f} tokens/s"
        f" · decode {stats.decode_tokens_per_s:,.1f} tokens/s{ENDINGS[stats.finish_reason]}"
    )


def unread_line(stats: TurnStats) -> str:
    """For an answer that was stopped while its prompt was being read."""
    n_read = stats.n_cached + stats.n_evaluated
    return f"Stopped after reading {n_read:,} of {stats.n_prompt:,} prompt tokens."


def counted_line(name: str, n_tokens: int, n_ctx: int) -> str:
    """A file's length and its share of the context."""
    return f"{name}: {n_tokens:,} tokens, {n_tokens / n_ctx:.0%} of the context."


def session_lines(
    answers: Sequence[TurnStats], n_ctx: int, full_cost: Callable[[TurnStats], FullCost]
) -> Iterator[str]:
    """The last answer, a conversation's totals, and how much of the context it fills."""
    if not answers:
        yield "Nothing has been answered yet."
        return
    pruned = sum(stats.n_pruned for stats in answers)
    exact = sum(stats.n_exact for stats in answers)
    full = sum(stats.n_full for stats in answers)
    cached = sum(stats.n_cached for stats in answers)
    decoded = sum(stats.n_decoded for stats in answers)
    last = answers[-1]
    yield f"Last answer: {stats_line(last)}"
    yield f"Its {_reading([last], full_cost)}"
    yield f"Answers: {len(answers)}, with {decoded:,} tokens written."
    left = f"{exact:,} left early, exactly" if exact else f"{pruned:,} pruned"
    yield f"Prompt tokens: {left}, {full:,} in full, {cached:,} reused from the cache."
    if len(answers) > 1:
        yield f"All {_reading(answers, full_cost)}"
    yield f"Context: {last.n_prompt + last.n_decoded:,} of {n_ctx:,} tokens used."


def _reading(answers: Sequence[TurnStats], full_cost: Callable[[TurnStats], FullCost]) -> str:
    """Seconds spent on reading prompts, and how many a full reading would have cost."""
    taken_s = sum(stats.prefill_s for stats in answers)
    pruned = [stats for stats in answers if stats.n_pruned or stats.n_exact]
    if not pruned:
        return f"reading took {taken_s:.2f} s, in full."
    costs = [full_cost(stats) for stats in pruned]
    rest_s = sum(stats.prefill_s for stats in answers if stats not in pruned)
    full_s = rest_s + sum(cost.seconds for cost in costs)
    n_measured = sum(cost.is_measured for cost in costs)
    if n_measured == len(costs):
        source = "as measured here with pruning off"
    elif n_measured:
        source = "partly measured here, partly computed from the limit"
    else:
        source = "computed from the limit, not measured"
    return f"reading took {taken_s:.2f} s; in full it would be {full_s:.2f} s ({source})."
