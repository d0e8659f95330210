"""How `demo` shows its two answers."""

from collections.abc import Iterator

from pop_local.ui.theme import say
from pop_local.workflows.demo import MAX_TOKENS, Comparison


def show_comparison(found: Comparison) -> None:
    """The answers, and what they took."""
    say("\n".join(_lines(found)))


def _lines(found: Comparison) -> Iterator[str]:
    yield f"Model: {found.model}"
    yield f"Prompt: a document of ours and a question, {found.n_prompt:,} tokens"
    yield f"Question: {found.question}"
    yield f"Answers: the likeliest tokens, {MAX_TOKENS} at most"
    yield ""
    yield f"Pruning off, first token after {found.full.ttft_s:.2f} s:"
    yield f"  {found.full.text}"
    yield ""
    yield f"Pruning on, first token after {found.pop.ttft_s:.2f} s:"
    yield f"  {found.pop.text}"
    yield ""
    speedup = found.speedup
    pairs = f", {speedup.min:.2f}-{speedup.max:.2f} in {found.n_pairs} pairs" * (found.n_pairs > 1)
    if found.full.text != found.pop.text:
        yield "The answers differ: pruning costs some quality, which `pop-local eval` measures."
        yield ""
    yield f"Speed-up: {speedup.median:.2f}x{pairs} (analytical limit {found.limit:.2f}x)"
    yield (
        f"Tokens pruned: {found.pop.n_pruned:,} of {found.n_prompt:,}; they skipped"
        f" {found.n_layer - found.boundary} of {found.n_layer} layers"
    )
