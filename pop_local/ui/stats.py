"""The figures of answers, as lines."""

from collections.abc import Iterator, Sequence

from pop_local.engine.turn import TurnStats

ENDINGS = {"stop": "", "length": " · cut off at the token limit", "interrupted": " · stopped"}


def stats_line(stats: TurnStats) -> str:
    """Prompt tokens (of which cached and pruned), TTFT, prefill and decode tokens per second."""
    cached = f"{stats.n_cached:,} cached, " if stats.n_cached else ""
    return (
        f"prompt {stats.n_prompt:,} tokens ({cached}{stats.n_pruned:,} pruned)"
        f" · TTFT {stats.ttft_s:.2f} s"
        f" · prefill {stats.prefill_tokens_per_s:,.0f} tokens/s"
        f" · decode {stats.decode_tokens_per_s:,.1f} tokens/s{ENDINGS[stats.finish_reason]}"
    )


def unread_line(stats: TurnStats) -> str:
    """For an answer that was stopped while its prompt was being read."""
    n_read = stats.n_cached + stats.n_pruned + stats.n_full
    return f"Stopped after reading {n_read:,} of {stats.n_prompt:,} prompt tokens."


def session_lines(answers: Sequence[TurnStats], n_ctx: int) -> Iterator[str]:
    """A conversation's totals, and how much of the context it fills."""
    if not answers:
        yield "Nothing has been answered yet."
        return
    pruned = sum(stats.n_pruned for stats in answers)
    full = sum(stats.n_full for stats in answers)
    cached = sum(stats.n_cached for stats in answers)
    decoded = sum(stats.n_decoded for stats in answers)
    last = answers[-1]
    yield f"Answers: {len(answers)}, with {decoded:,} tokens written."
    yield f"Prompt tokens: {pruned:,} pruned, {full:,} in full, {cached:,} reused from the cache."
    yield f"Context: {last.n_prompt + last.n_decoded:,} of {n_ctx:,} tokens used."
    yield f"Last answer: {stats_line(last)}"
