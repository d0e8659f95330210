"""Format statistics about answers as lines of text."""

from collections.abc import Iterator, Sequence

from pop_local.engine.chat_messages import SessionStats, TurnStats
from pop_local.engine.images.pictures import Picture

ENDINGS = {"stop": "", "length": " · cut off at the token limit", "interrupted": " · stopped"}


def stats_line(stats: TurnStats) -> str:
    """Format an answer's statistics. Unlike the prefill rate, TTFT includes image encoding."""
    if stats.n_decoded == 0:
        n_read = stats.n_cached + stats.n_evaluated
        return f"Reading stopped after {n_read:,} of {stats.n_prompt:,} prompt tokens."
    pictures = f" · images {stats.n_image:,} tokens" if stats.n_image else ""
    if stats.encode_s:
        pictures += f" encoded in {stats.encode_s:.2f} s"
    ending = " · the answer repeated itself" if stats.is_repeating else ENDINGS[stats.finish_reason]
    return (
        f"prompt {stats.n_prompt:,} tokens ({stats.left}){pictures}"
        f" · TTFT {stats.ttft_s:.2f} s"
        f" · prefill {stats.prefill_tokens_per_s:,.0f} tokens/s"
        f" · decode {stats.decode_tokens_per_s:,.1f} tokens/s{ending}"
    )


def picture_line(picture: Picture, n_tokens: int, n_ctx: int) -> str:
    return counted_line(f"{picture.name} ({picture.width} x {picture.height})", n_tokens, n_ctx)


def counted_line(name: str, n_tokens: int, n_ctx: int) -> str:
    return f"{name}: {n_tokens:,} tokens, {n_tokens / n_ctx:.0%} of the context."


def session_lines(answers: Sequence[TurnStats], n_ctx: int, n_refilled: int) -> Iterator[str]:
    """Yield the last answer's statistics, the totals, and how full the context is.

    `n_refilled`: the number of tokens that have caught up since the last answer.
    """
    if not answers:
        yield "No answers yet."
        return
    total = SessionStats.of(answers)
    last = answers[-1]
    yield f"Last answer: {stats_line(last)}"
    yield f"Answers: {len(answers)} ({total.n_decoded:,} tokens)."
    n_fast, how = total.n_pruned, "with fast reading"
    if total.n_skipped_exact:
        n_fast, how = total.n_skipped_exact, f"without layers {last.exact_layer} and up (lossless)"
    yield (
        f"Prompt tokens: pop-local read {n_fast:,} {how}, read {total.n_full:,} in full, and reused"
        f" {total.n_cached:,} from the cache."
    )
    n_refilled += total.n_refilled
    if total.n_deep or n_refilled:
        yield (
            f"Names, numbers, and symbols: {total.n_deep:,} tokens read in full. After"
            f" fast reading, {n_refilled:,} tokens ran through the layers that they had skipped."
        )
    yield f"Context: {last.n_prompt + last.n_decoded:,} of {n_ctx:,} tokens used."
