"""Turns of a conversation with the real SmolLM2: figures, reuse, stopping."""

import os
import signal
import threading
from dataclasses import replace

import pytest

from converter.errors import PopError, StoppedError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompts import PLAIN_STOPS
from pop_local.engine.turn import Message, TurnStats
from support.synthetic import make_gguf

STORY = (
    "The ferry to the island leaves the stone pier at half past six. Old Mara sells coffee there, "
    "and her dog sleeps under the table. Nobody has ever seen it awake. "
) * 3
QUESTION = Message("user", STORY + "Who sells coffee at the pier?")
FOLLOW_UP = Message("user", "And what does the dog do?")
MODES = [Mode.OFF, Mode.CONTEXT]


@pytest.fixture(scope="module")
def shared(smollm2_pop) -> PopModel:
    return PopModel(smollm2_pop, n_ctx=512, n_threads=1, n_batch=64, n_ubatch=64)


@pytest.fixture
def model(shared) -> PopModel:
    """As if freshly opened."""
    shared.set_pop(Mode.CONTEXT)
    shared.clear()
    return shared


def ask(model: PopModel, *messages: Message, **options) -> tuple[str, TurnStats]:
    defaults = {"temperature": 0.0, "max_tokens": 12}
    *pieces, last = model.chat_turn(messages, **defaults | options)
    assert all(piece.stats is None for piece in pieces)
    assert last.stats is not None
    return "".join(piece.text for piece in pieces) + last.text, last.stats


def test_the_figures_add_up(model):
    text, stats = ask(model, QUESTION)
    assert text.strip()
    assert (stats.n_cached, stats.n_full) == (0, 17)
    assert stats.n_pruned == stats.n_prompt - 17 > 120
    assert 0 < stats.prefill_s <= stats.ttft_s
    assert stats.prefill_tokens_per_s == pytest.approx(stats.n_prompt / stats.prefill_s)
    assert 1 < stats.n_decoded <= 12
    assert stats.decode_tokens_per_s == pytest.approx((stats.n_decoded - 1) / stats.decode_s)


def test_full_mode_prunes_nothing(model):
    model.set_pop(Mode.OFF)
    _, stats = ask(model, QUESTION)
    assert (stats.n_pruned, stats.n_full) == (0, stats.n_prompt)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_turn_reuses_the_first(model, mode):
    model.set_pop(mode)
    answer, first = ask(model, QUESTION)
    conversation = (QUESTION, Message("assistant", answer), FOLLOW_UP)
    text, second = ask(model, *conversation)
    assert second.n_cached >= first.n_prompt
    assert second.n_cached + second.n_pruned + second.n_full == second.n_prompt
    model.clear()
    without, fresh = ask(model, *conversation)
    assert (fresh.n_cached, fresh.n_prompt) == (0, second.n_prompt)
    if mode is Mode.OFF:
        assert text == without


@pytest.mark.parametrize("first", MODES)
def test_switching_in_mid_conversation_reads_all_of_it_again(model, first):
    model.set_pop(first)
    answer, _ = ask(model, QUESTION)
    conversation = (QUESTION, Message("assistant", answer), FOLLOW_UP)
    model.set_pop(MODES[1 - MODES.index(first)])
    text, stats = ask(model, *conversation)
    assert stats.n_cached == 0
    model.clear()
    assert ask(model, *conversation)[0] == text


def test_progress_counts_the_tokens_that_are_not_cached(model):
    seen: list[tuple[int, int]] = []
    _, first = ask(model, QUESTION, on_prefill=lambda *counts: seen.append(counts))
    assert seen == [*((n, first.n_prompt) for n in range(0, first.n_prompt, 64)), seen[-1]]
    assert seen[-1] == (first.n_prompt, first.n_prompt)
    seen.clear()
    longer = replace(QUESTION, content=QUESTION.content + " Answer in one word.")
    _, second = ask(model, longer, on_prefill=lambda *counts: seen.append(counts))
    assert seen[-1] == (second.n_prompt - second.n_cached,) * 2


def test_whoever_watches_the_model_stops_more_than_the_answer(model):
    with model.watching_prefill(None, lambda: True):
        with pytest.raises(StoppedError):
            ask(model, QUESTION)
        _, stats = ask(model, QUESTION, should_stop=lambda: False, max_tokens=1)
        with pytest.raises(StoppedError):
            model.eval([1, 2])
    assert stats.n_decoded == 1
    model.eval([1, 2])


def test_the_seed_makes_a_warm_answer_repeatable(model):
    warm = {"temperature": 1.5, "seed": 7}
    text, _ = ask(model, QUESTION, **warm)
    model.clear()
    assert ask(model, QUESTION, **warm)[0] == text
    model.clear()
    assert ask(model, QUESTION, **warm | {"seed": 8})[0] != text


def test_an_answer_ends_at_its_limit_at_a_stop_string_or_by_itself(model):
    text, stats = ask(model, QUESTION, max_tokens=5)
    assert (stats.n_decoded, stats.finish_reason) == (5, "length")
    word = text.split()[2]
    cut, stats = ask(model, QUESTION, stops=(word,))
    assert (cut, stats.finish_reason) == (text[: text.index(word)], "stop")
    _, stats = ask(model, Message("user", "Say hello."), max_tokens=200)
    assert stats.finish_reason == "stop"


def test_an_answer_ends_where_the_context_does(smollm2_pop):
    small = PopModel(smollm2_pop, n_ctx=256, n_threads=1)
    _, stats = ask(small, QUESTION, max_tokens=None, stops=())
    assert stats.finish_reason in ("stop", "length")
    assert stats.n_prompt + stats.n_decoded <= small.n_ctx()


def test_a_prompt_beyond_the_context_says_so(model):
    with pytest.raises(PopError) as caught:
        ask(model, Message("user", STORY * 6))
    assert "512" in caught.value.message
    assert "n_ctx=" in caught.value.hint


# --- stopping


def test_an_answer_that_is_abandoned_leaves_the_model_usable(model):
    expected, _ = ask(model, QUESTION)
    chunks = model.chat_turn([QUESTION], temperature=0.0)
    for _ in range(4):
        next(chunks)
    chunks.close()
    text, stats = ask(model, QUESTION)
    assert text == expected
    assert stats.n_cached > 0


def test_a_prefill_that_is_stopped_has_its_figures_and_leaves_the_model_usable(model):
    expected, _ = ask(model, QUESTION)
    model.clear()
    asked = 0

    def in_the_second_batch() -> bool:
        nonlocal asked
        asked += model.n_tokens >= 64
        return asked > 50

    text, stats = ask(model, QUESTION, should_stop=in_the_second_batch)
    assert (text, stats.finish_reason, stats.n_decoded) == ("", "interrupted", 0)
    assert model.n_tokens == 64
    assert ask(model, QUESTION)[0] == expected


def test_a_stopped_answer_keeps_what_it_said(model):
    expected, _ = ask(model, QUESTION)
    n_asked = 0

    def after_a_while() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked > 3

    text, stats = ask(model, QUESTION, should_stop=after_a_while)
    assert stats.finish_reason == "interrupted"
    assert expected.startswith(text) and text != expected


def test_ctrl_c_ends_a_prefill_and_leaves_the_model_usable(model):
    expected, _ = ask(model, QUESTION)
    model.clear()
    begun = threading.Event()

    def press() -> None:
        begun.wait(timeout=60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ask(model, QUESTION, on_prefill=lambda done, total: begun.set() if done == 64 else None)
    thread.join()
    assert model.n_tokens < 128
    assert ask(model, QUESTION)[0] == expected


def test_a_stop_right_after_the_last_batch_keeps_the_whole_prompt(model):
    expected, whole = ask(model, QUESTION)
    longer = [QUESTION, Message("assistant", expected), QUESTION]
    expected_later, later = ask(model, *longer)
    model.clear()
    n = whole.n_prompt
    text, stats = ask(model, QUESTION, should_stop=lambda: model.n_tokens == n)
    assert (text, stats.finish_reason, model.n_tokens) == ("", "interrupted", n)
    text, stats = ask(model, QUESTION)
    assert (text, stats.n_cached) == (expected, n)
    text, stats = ask(model, *longer)
    assert (text, stats.n_cached) == (expected_later, later.n_cached)


def test_ctrl_c_right_after_the_last_batch_keeps_the_whole_prompt(model):
    expected, whole = ask(model, QUESTION)
    model.clear()

    def press(done: int, total: int) -> None:
        if done == total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ask(model, QUESTION, on_prefill=press)
    assert model.n_tokens == whole.n_prompt
    text, stats = ask(model, QUESTION)
    assert (text, stats.n_cached) == (expected, whole.n_prompt)


def test_an_answer_does_not_go_on_over_an_emptied_cache(model):
    chunks = model.chat_turn([QUESTION], temperature=0.0)
    next(chunks)
    model.set_pop(Mode.OFF)
    with pytest.raises(PopError, match="emptied"):
        list(chunks)


# --- templates


def test_a_template_that_refuses_the_conversation_is_an_error(tmp_path):
    refusing = "{{ raise_exception('no system prompts') }}"
    model = PopModel(make_gguf(tmp_path / "m.gguf", "llama", chat_template=refusing), n_threads=1)
    with pytest.raises(PopError, match="no system prompts"):
        ask(model, QUESTION)


def test_a_template_that_is_broken_is_an_error(tmp_path):
    with pytest.raises(PopError, match="cannot be opened"):
        PopModel(make_gguf(tmp_path / "m.gguf", "llama", chat_template="{% for %}"), n_threads=1)


def test_a_base_model_gets_a_plain_transcript(gemma):
    model = PopModel(gemma, n_ctx=256, n_threads=1)
    text, stats = ask(model, Message("user", "What is the capital of France?"))
    assert "Paris" in text
    assert not any(stop in text for stop in PLAIN_STOPS)
    # BOS, which Gemma cannot do without, is part of the prompt.
    assert model.input_ids[0] == model.token_bos()
    assert stats.n_prompt < 20


def test_plain_text_is_continued(model):
    *_, last = model.continue_text("One, two, three, four,", temperature=0.0, max_tokens=8)
    assert last.stats is not None
    assert last.stats.n_prompt < 12
    pieces = model.continue_text("One, two, three, four,", temperature=0.0, max_tokens=8)
    assert "five" in "".join(piece.text for piece in pieces)


def test_llama_cpps_own_chat_completion_works(model):
    answer = model.create_chat_completion(
        [{"role": "user", "content": QUESTION.content}], temperature=0.0, max_tokens=12
    )
    assert answer["choices"][0]["message"]["content"] == ask(model, QUESTION)[0]
