"""Answers: statistics, progress, ends and stops."""

from dataclasses import replace

import pytest

from pop_base.errors import PopError, StoppedError
from pop_local.engine.chat_messages import Message
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from support.calls import append, first_of, opened
from support.conversations import ask

QUESTION = Message("user", "The ferry leaves the pier at half past six. " * 4 + "Who sells coffee?")


@pytest.fixture(scope="module")
def opened_chat_model(chat_model) -> PopModel:
    """Open the model with batches of 64 tokens, so that a prompt has several."""
    return opened(chat_model)


def test_token_counts_add_up(model):
    text, stats = ask(model, QUESTION)
    assert text
    assert (stats.n_cached, stats.n_full) == (0, 17)
    assert stats.n_pruned == stats.n_prompt - 17 > 120
    assert 0 < stats.prefill_s <= stats.ttft_s
    assert stats.prefill_tokens_per_s == pytest.approx(stats.n_prompt / stats.prefill_s)
    assert 1 < stats.n_decoded <= 12
    assert stats.decode_tokens_per_s == pytest.approx((stats.n_decoded - 1) / stats.decode_s)


def test_progress_counts_the_tokens_that_are_not_cached(model):
    seen: list[tuple[int, int]] = []
    _, first = ask(model, QUESTION, on_prefill=lambda *counts: seen.append(counts))
    assert seen == [*((n, first.n_prompt) for n in range(0, first.n_prompt, 64)), seen[-1]]
    assert seen[-1] == (first.n_prompt, first.n_prompt)
    seen.clear()
    longer = replace(QUESTION, content=QUESTION.content + " Answer in one word.")
    _, second = ask(model, longer, on_prefill=lambda *counts: seen.append(counts))
    assert seen[-1] == (second.n_prompt - second.n_cached,) * 2


def test_stopped_by_raises_unless_the_answer_has_should_stop(model):
    with stopped_by(lambda: True):
        with pytest.raises(StoppedError):
            ask(model, QUESTION)
        _, stats = ask(model, QUESTION, should_stop=lambda: False, max_tokens=1)
        with pytest.raises(StoppedError):
            append(model, [1, 2])
    assert stats.n_decoded == 1
    append(model, [1, 2])


def test_answer_ends_at_its_limit_and_at_a_stop_string(model):
    text, stats = ask(model, QUESTION, max_tokens=5)
    assert (stats.n_decoded, stats.finish_reason) == (5, "length")
    stop = text[2:4]
    cut, stats = ask(model, QUESTION, stops=(stop,))
    assert (cut, stats.finish_reason) == (text[: text.index(stop)], "stop")


def test_answer_ends_at_context_limit(chat_model):
    small = opened(chat_model, n_ctx=256)
    _, stats = ask(small, Message("user", "Who?"), max_tokens=None)
    assert stats.finish_reason == "length"
    assert stats.n_prompt + stats.n_decoded == small.engine.context.n_ctx


# --- stopping


def test_stopped_prefill_returns_stats(model):
    expected, _ = ask(model, QUESTION)
    first_of(model).cache.clear()
    n_calls = 0

    def in_the_second_batch() -> bool:
        nonlocal n_calls
        n_calls += first_of(model).cache.n_tokens >= 64
        return n_calls > 50

    text, stats = ask(model, QUESTION, should_stop=in_the_second_batch)
    assert (text, stats.finish_reason, stats.n_decoded) == ("", "interrupted", 0)
    assert first_of(model).cache.n_tokens == 64
    assert ask(model, QUESTION)[0] == expected


def test_stopped_answer_keeps_its_text(model):
    expected, _ = ask(model, QUESTION)
    stops = iter([False] * 3)
    text, stats = ask(model, QUESTION, should_stop=lambda: next(stops, True))
    assert stats.finish_reason == "interrupted"
    assert expected.startswith(text) and text != expected


def test_stop_after_last_batch_keeps_whole_prompt(model):
    expected, whole = ask(model, QUESTION)
    longer = [QUESTION, Message("assistant", expected), QUESTION]
    expected_later, later = ask(model, *longer)
    first_of(model).cache.clear()
    n = whole.n_prompt
    text, stats = ask(model, QUESTION, should_stop=lambda: first_of(model).cache.n_tokens == n)
    assert (text, stats.finish_reason, first_of(model).cache.n_tokens) == ("", "interrupted", n)
    text, stats = ask(model, QUESTION)
    assert (text, stats.n_cached) == (expected, n)
    text, stats = ask(model, *longer)
    assert (text, stats.n_cached) == (expected_later, later.n_cached)


def test_answer_stops_after_its_cache_was_cleared(model):
    chunks = model.ask([QUESTION], temperature=0.0, max_tokens=12)
    next(chunks)
    model.engine.set_mode(Mode.OFF)
    with pytest.raises(PopError, match="emptied"):
        list(chunks)
