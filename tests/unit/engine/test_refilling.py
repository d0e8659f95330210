"""Refilling while the chat is idle, before saving, and between server requests."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import FULL
from pop_local.engine.llama.backend import Mode
from pop_local.ui.chat import refill
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.repl import converse
from pop_local.ui.chat.slash import run_command
from support.calls import NOISE, first_of, opened, read, wait_for
from support.converted import tiny
from support.scripted_chat import Transcript
from support.serving import app_client, app_of

WORDS = "a b c d e f g h " * 40


@pytest.fixture(scope="module")
def pop_file(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("refill"), chat_template="{{ messages[0]['content'] }}")


@pytest.fixture
def chat(pop_file):
    def open_dialogue(*lines, mode="idle", **options):
        model = opened(pop_file, keep_states=mode != "off", **options)
        sampling = {"temperature": 0.0, "max_tokens": 4}
        screen = Transcript(*lines)
        return Dialogue(model, lambda *_: model, screen, sampling=sampling, refill=mode)

    return open_dialogue


@pytest.fixture
def dialogue(chat):
    return chat()


def test_refills_rows_while_the_user_types(dialogue):
    assert refill.status(dialogue) == ""
    dialogue.ask(WORDS)
    assert first_of(dialogue.model).cache.n_exact == 0
    with refill.idling(dialogue):
        wait_for(lambda: first_of(dialogue.model).refiller.n_refillable == 0)
    n_tokens = first_of(dialogue.model).cache.n_tokens
    assert first_of(dialogue.model).cache.n_exact == n_tokens > 200
    assert first_of(dialogue.model).states.key == FULL
    assert refill.status(dialogue) == f"Cache: {n_tokens} of {n_tokens} tokens have exact values"


@pytest.mark.parametrize("pause_s", [0, 0.002, 0.01, 0.03])
def test_input_stops_refilling(dialogue, pause_s):
    dialogue.ask(WORDS)
    with refill.idling(dialogue):
        time.sleep(pause_s)
    n_exact = first_of(dialogue.model).cache.n_exact
    assert not any(thread.name == "pop-local idle" for thread in threading.enumerate())
    dialogue.ask("and now?")
    assert dialogue.session.answer_stats[-1].n_refilled == n_exact
    assert first_of(dialogue.model).cache.n_exact <= first_of(dialogue.model).cache.n_tokens


def test_off_refills_nothing(chat):
    dialogue = chat(mode="off")
    dialogue.ask(WORDS)
    with refill.idling(dialogue):
        pass
    assert (first_of(dialogue.model).cache.n_exact, refill.status(dialogue)) == (0, "")
    run_command(dialogue, "/stats")
    assert "tokens have exact values" not in dialogue.screen.shown


def talked(dialogue):
    """Return the shown text after all lines were processed."""
    converse(dialogue, dialogue.screen.read_line)
    return dialogue.screen.shown


@pytest.mark.parametrize(
    "lines", [("/clear",), ("/full on",), ("/full on", "/full off"), ("/retry",), ("/undo",), ()]
)
def test_refilling_continues_after_other_commands(chat, lines):
    dialogue = chat(WORDS, *lines, WORDS[::-1])
    assert "!" not in talked(dialogue)
    model = dialogue.model
    first_of(model).refiller.refill()
    assert first_of(model).cache.n_exact == first_of(model).cache.n_tokens > 200
    tokens = first_of(model).cache.tokens[: first_of(model).cache.n_tokens].tolist()
    full = opened(Path(model.engine.context.files.path), full=True)
    np.testing.assert_allclose(read(model, tokens), read(full, tokens), atol=NOISE)


def test_rows_whose_states_were_dropped_stay_pruned(dialogue):
    dialogue.ask(WORDS)
    dialogue.model.engine.set_refill(False)
    dialogue.model.engine.set_refill(True)
    dialogue.ask("what?")
    assert first_of(dialogue.model).refiller.refill() == 0
    assert first_of(dialogue.model).cache.n_exact < 200


def test_stats_count_refilled_tokens_since_last_answer(dialogue):
    dialogue.ask(WORDS)
    with refill.idling(dialogue):
        wait_for(lambda: first_of(dialogue.model).refiller.n_refillable == 0)
    n_tokens = first_of(dialogue.model).cache.n_tokens
    run_command(dialogue, "/stats")
    caught_up = f"{n_tokens} tokens ran through the layers that they had skipped."
    assert f"After fast reading, {caught_up}" in dialogue.screen.shown
    dialogue.ask("and now?")
    run_command(dialogue, "/stats")
    assert dialogue.screen.shown.count(caught_up) == 2


def test_status_counts_the_tokens_of_this_conversation(dialogue):
    dialogue.ask(WORDS)
    n_tokens = first_of(dialogue.model).cache.n_tokens
    assert refill.status(dialogue) == f"Cache: 0 of {n_tokens} tokens have exact values"
    dialogue.forget()
    assert refill.status(dialogue) == ""


def test_full_off_keeps_exact_cache(chat):
    dialogue = chat("/full on", WORDS, "/full off")
    talked(dialogue)
    cache = first_of(dialogue.model).cache
    assert first_of(dialogue.model).settings.mode is Mode.CONTEXT
    assert cache.n_exact == cache.n_tokens > 200


@pytest.mark.parametrize("switch", ["on", "off"])
def test_larger_context_keeps_the_cached_rows(pop_file, switch):
    models = [opened(pop_file, n_ctx=n_ctx) for n_ctx in (512, 1024)]
    screen = Transcript(f"/full {switch}", WORDS)
    sampling = {"temperature": 0.0, "max_tokens": 4}
    dialogue = Dialogue(models[0], lambda *_: models[1], screen, sampling=sampling)
    converse(dialogue, screen.read_line)
    before = first_of(models[0]).cache.tokens.tolist()
    assert dialogue.enlarge(1024)
    assert first_of(dialogue.model).cache.tokens.tolist() == before
    assert len(before) > 200


def test_ctrl_c_after_input_ends_stops_refilling(dialogue, monkeypatch):
    dialogue.ask(WORDS)
    joined = threading.Thread.join
    pressed = iter([True])

    def join(thread, timeout=None):
        if next(pressed, False):
            raise KeyboardInterrupt
        joined(thread, timeout)

    with pytest.raises(KeyboardInterrupt), refill.idling(dialogue):
        monkeypatch.setattr(threading.Thread, "join", join)
    assert not any(thread.name == "pop-local idle" for thread in threading.enumerate())


def test_server_refills_between_requests(pop_file):
    model = opened(pop_file, keep_states=True)
    with app_client(app_of(model, "tiny")) as client:
        body = {"model": "tiny", "prompt": WORDS, "max_tokens": 2, "temperature": 0}
        first = client.post("/v1/completions", json=body).json()["usage"]["pop"]
        assert (first["n_refilled"], first["n_exact"]) == (0, 0)
        wait_for(lambda: first_of(model).refiller.n_refillable == 0)
        again = client.post("/v1/completions", json={**body, "prompt": WORDS + "i"}).json()
        pop = again["usage"]["pop"]
        assert pop["n_refilled"] > 200
        assert pop["n_exact"] > 200
        metrics = client.get("/metrics").text
        assert f"pop_refilled_tokens_total {pop['n_refilled']}.0" in metrics


@pytest.mark.parametrize("by", ["request", "server"])
def test_repeatable_answers_are_equal(pop_file, by):
    model = opened(pop_file, keep_states=True)
    first_of(model).states.prompts = PromptCache(1 << 26)
    with app_client(app_of(model, "tiny", repeatable=by == "server")) as client:

        def ask(prompt: str, **more: bool):
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1} | more
            answer = client.post("/v1/completions", json=body).json()
            return answer["choices"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        options = {} if by == "server" else {"repeatable": True}
        first, _ = ask(WORDS, **options)
        for prompt in (WORDS + "i j k", "another", WORDS[:99]):
            ask(prompt, repeatable=False)
            assert ask(WORDS, **options) == (first, 0)
            wait_for(lambda: first_of(model).refiller.n_refillable == 0)
        answer, n_cached = ask(WORDS, repeatable=False)
        assert n_cached > 0 and answer != first


def test_server_answers_after_an_error_in_refilling(pop_file, monkeypatch):
    model = opened(pop_file, keep_states=True)

    def refill(*_):
        raise RuntimeError

    monkeypatch.setattr(first_of(model).refiller, "refill", refill)
    with app_client(app_of(model, "tiny")) as client:
        for _ in range(2):
            body = {"prompt": WORDS, "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        wait_for(lambda: not first_of(model).refiller.is_on)
