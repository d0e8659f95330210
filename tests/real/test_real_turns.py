"""Conversation turns that need a real model: an answer that ends, Ctrl-C, plain text."""

import os
import signal
import threading

import pytest

from pop_local.engine.chat_messages import Message
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import PLAIN_STOPS
from support.calls import continued, first_of
from support.conversations import ask

QUESTION = Message("user", "The ferry leaves the pier at half past six. " * 16 + "When is it gone?")


@pytest.fixture(scope="module")
def model(smollm2_pop) -> PopModel:
    return PopModel(EngineOptions.of(smollm2_pop, n_ctx=512, n_threads=1, n_batch=64, n_ubatch=64))


def test_answer_stops_before_the_token_limit(model):
    _, stats = ask(model, Message("user", "What is 1 + 1? Answer with a number."), max_tokens=200)
    assert stats.finish_reason == "stop"


def test_ctrl_c_stops_a_prefill_and_leaves_the_model_usable(model):
    expected, _ = ask(model, QUESTION)
    first_of(model).cache.clear()
    begun = threading.Event()

    def press() -> None:
        begun.wait(timeout=60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ask(model, QUESTION, on_prefill=lambda done, total: begun.set() if done == 64 else None)
    thread.join()
    assert first_of(model).cache.n_tokens < 128
    assert ask(model, QUESTION)[0] == expected


def test_base_model_gets_a_plain_transcript(gemma):
    model = PopModel(EngineOptions.of(gemma, n_ctx=256, n_threads=1))
    text, stats = ask(model, Message("user", "What is the capital of France?"))
    assert "Paris" in text
    assert not any(stop in text for stop in PLAIN_STOPS)
    # Gemma needs BOS, so the prompt contains it.
    assert (first_of(model).cache.tokens[0],) == model.engine.context.vocabulary.bos
    assert stats.n_prompt < 20


def test_plain_text_is_continued(model):
    *_, last = continued(model, "A, B, C, D, E,", temperature=0.0, max_tokens=8)
    assert last.stats is not None
    assert last.stats.n_prompt < 12
    pieces = continued(model, "A, B, C, D, E,", temperature=0.0, max_tokens=8)
    assert "F, G" in "".join(piece.text for piece in pieces)
