"""Concurrent requests do not wait for each other, and get the results of single requests."""

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import takewhile

import httpx2
import pytest

from pop_local.engine.chat_messages import Chunk
from pop_local.engine.llama.devices import has_kernels
from pop_local.engine.refill import Refiller
from pop_local.server.worker import Job
from support.calls import opened, wait_for
from support.chat_tools import function
from support.server_requests import LONG, N_CTX, NAME, chat, complete, message_of, text_of
from support.serving import app_client, app_of, metric_values, served

ENDLESS = "root ::= [a-z] root"
N_CLIENTS = 6
SLOTS = 3
# More frequent comments, so that the tests miss no state.
EAGER = "from pop_local.server import job_responses; job_responses._PROGRESS_S = 0.001"


@pytest.fixture(scope="module")
def several(path):
    """A server in another process: a TestClient would wait for complete answers."""
    with (
        served(path, "--parallel", SLOTS, "--ctx", 65536, changed=EAGER) as server,
        httpx2.Client(base_url=server.root, timeout=60) as client,
    ):
        yield client


@contextmanager
def endless(client, content: str = LONG):
    """Start an endless answer and yield its lines."""
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "grammar": ENDLESS, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()  # closing it would disconnect
        yield lines


def is_text(line: str) -> bool:
    return '"content": ' in line and '"content": null' not in line


def begun(lines) -> None:
    """Wait for an answer's first text."""
    next(filter(is_text, lines))


def test_short_request_completes_during_long_answer(several):
    with endless(several) as lines:
        begun(lines)
        for number in range(3):
            answer = chat(several, f"number {number}", grammar=f'root ::= "mark-{number}"')
            assert text_of(answer) == f"mark-{number}"
        begun(lines)
        assert metric_values(several)["pop_queue_length"] == 0


def test_concurrent_answers_equal_single_answers(several, client):
    """Check greedy answers of different lengths, with a unique mark in each."""
    prompts = [f"{LONG}{LONG[: 40 * number]} number {number}" for number in range(N_CLIENTS)]

    def ask(number: int) -> tuple[str, str]:
        free = text_of(chat(several, prompts[number], max_tokens=2))
        marked = text_of(complete(several, prompts[number], grammar=f'root ::= "mark-{number}"'))
        return free, marked

    with ThreadPoolExecutor(N_CLIENTS) as clients:
        for _ in range(3):
            pairs = list(clients.map(ask, range(N_CLIENTS)))
            assert [marked for _, marked in pairs] == [f"mark-{n}" for n in range(N_CLIENTS)]
    # The first token depends on the prompt only; later ones may depend on the batches.
    alone = [text_of(chat(client, prompt, max_tokens=2)) for prompt in prompts]
    same = sum(pair[0][:1] == other[:1] for pair, other in zip(pairs, alone, strict=True))
    assert same >= N_CLIENTS - 1


def test_cached_prompt_is_reused_concurrently(several):
    first = chat(several, "a. " + LONG)
    with endless(several, "b. " + LONG) as lines:
        begun(lines)
        again = chat(several, "a. " + LONG)
    for usage in (first.json()["usage"], again.json()["usage"]):
        assert usage["pop"]["reason"] is None
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.7 * again.json()["usage"]["prompt_tokens"]


def test_stream_reports_queue_place_and_progress(several):
    with ExitStack() as running:
        for number in range(SLOTS):
            lines = running.enter_context(endless(several, f"{number} {LONG * 6}"))
            comments = list(takewhile(lambda line: not is_text(line), lines))
        assert any(re.fullmatch(r": read \d+ of \d+", line) for line in comments)
        with endless(several, "one more") as lines:
            assert ": queued 1" in (next(lines), next(lines), next(lines), next(lines))
            assert metric_values(several)["pop_queue_length"] == 1


def test_short_prompt_is_answered_while_a_long_one_is_read(several):
    with endless(several, LONG * 40) as lines:
        next(line for line in lines if line.startswith(": read"))
        assert text_of(chat(several, "title?", grammar='root ::= "a title"')) == "a title"
        [long] = [slot for slot in several.get("/slots").json() if slot["is_processing"]]
        assert 0 < long["n_read"] < long["n_rows"]
        begun(lines)


def test_disconnect_cancels_queued_prompt(several):
    with endless(several, LONG * 40) as lines:
        next(line for line in lines if line.startswith(": read"))
        with endless(several, "longer. " + LONG * 50) as waiting:
            next(waiting)
        assert text_of(chat(several, "title?", grammar='root ::= "a title"')) == "a title"
        wait_for(lambda: sum(slot["is_processing"] for slot in several.get("/slots").json()) == 1)
        begun(lines)


def test_disconnect_releases_the_slot(several):
    for _ in range(5):
        with ExitStack() as running:
            for _ in range(SLOTS):
                begun(running.enter_context(endless(several)))
        assert text_of(chat(several, "a", grammar='root ::= "yes"')) == "yes"


def test_full_request_completes_during_pruned_answer(several):
    with endless(several) as lines:
        begun(lines)
        full = chat(several, "in full. " + LONG, pop=False).json()["usage"]["pop"]
        again = chat(several, "pruned. " + LONG).json()["usage"]["pop"]
    assert (full["reading"], full["n_pruned"], again["reading"]) == ("full", 0, "pruned")


def test_embeddings_complete_during_answer(several, client):
    with endless(several) as lines:
        begun(lines)
        vector = several.post("/v1/embeddings", json={"input": "one two"}).json()["data"][0]
    expected = client.post("/v1/embeddings", json={"input": "one two"}).json()["data"][0]
    assert vector["embedding"] == pytest.approx(expected["embedding"], abs=1e-3)


def test_concurrent_requests_call_tools(several):
    def ask(number: int) -> str:
        sent = {"tools": [function("look")], "tool_choice": "required", "max_tokens": 512}
        message, reason = message_of(chat(several, f"{number} look", **sent))
        assert reason == "tool_calls"
        return message["tool_calls"][0]["function"]["name"]

    with ThreadPoolExecutor(3) as clients:
        assert set(clients.map(ask, range(6))) == {"look"}


def test_idle_server_refills_every_sequence(path):
    model = opened(path, n_ctx=N_CTX, n_parallel=2, keep_states=True)
    with app_client(app_of(model, NAME)) as client:
        with ThreadPoolExecutor(2) as clients:
            list(clients.map(lambda text: chat(client, text), ["one. " + LONG, "two. " + LONG]))
        wait_for(
            lambda: not any(sequence.refiller.n_refillable for sequence in model.engine.sequences)
        )
        caches = [sequence.cache for sequence in model.engine.sequences]
        assert all(cache.n_exact == cache.n_tokens > 200 for cache in caches)
        for text in ("one. " + LONG, "two. " + LONG):
            pop = chat(client, text).json()["usage"]["pop"]
            assert pop["n_refilled"] > 200
    model.close()


def test_slots_report_rows_that_can_catch_up(path, monkeypatch):
    def refill_nothing(self, should_stop):
        time.sleep(0.01)
        return 0

    monkeypatch.setattr(Refiller, "refill", refill_nothing)
    model = opened(path, n_ctx=N_CTX, n_parallel=2, keep_states=True)
    with app_client(app_of(model, NAME)) as client:
        prompts = ("one. " + LONG, "two. " + 2 * LONG)
        pops = [chat(client, prompt).json()["usage"]["pop"] for prompt in prompts]
        behind = {slot["job"]: slot["n_behind"] for slot in client.get("/slots").json()}
        assert behind.keys() == {pop["job"] for pop in pops}
        assert all(0 < pop["n_pruned"] <= behind[pop["job"]] for pop in pops)
        third = chat(client, prompts[1] + "more").json()["usage"]["pop"]
        jobs = [slot["job"] for slot in client.get("/slots").json()]
    model.close()
    assert sorted(jobs) == sorted([pops[0]["job"], third["job"]])


def test_repeatable_answers_ignore_concurrent_requests(several):
    """Other answers occupy other cells in each round, which changes roundings."""

    def ask(number: int) -> str:
        return text_of(chat(several, f"{number} {LONG}", max_tokens=16, repeatable=True))

    expected = [ask(0), ask(1)]
    for number in range(4):
        with ThreadPoolExecutor(4) as clients:
            others = [clients.submit(chat, several, "x" * (9 * number + n)) for n in range(3)]
            assert clients.submit(ask, number % 2).result() == expected[number % 2]
            assert all(other.result().status_code == 200 for other in others)


@pytest.mark.parametrize("ends", ["server", "client"])
def test_waiting_repeatable_answer_stops_without_changing_others(path, ends):
    """It waits for a running answer until the server stops or its client disconnects."""
    model = opened(path, n_ctx=N_CTX, n_parallel=2)
    app = app_of(model, NAME)
    (served,) = app.state.models.loaded
    with app_client(app) as client, ThreadPoolExecutor(2) as clients:
        endless_answer = clients.submit(chat, client, grammar=ENDLESS, max_tokens=900)
        wait_for(lambda: served.worker.running)
        waiting = clients.submit(chat, client, "a", repeatable=True)
        wait_for(lambda: len(served.worker._seen_s) == 2)
        if ends == "client":
            [job] = served.worker._seen_s.keys() - served.worker.running.values()
            job.cancelled.set()
            assert waiting.result(timeout=30).status_code == 499
            assert served.worker.running
        app.state.models.stop()
        assert endless_answer.result(timeout=30).status_code == 503
        assert waiting.result(timeout=30).status_code == (503 if ends == "server" else 499)
    model.close()


def test_single_client_keeps_its_slot(path, monkeypatch):
    """Its next request arrives when the last event of an answer has been sent."""
    put = Job.put

    def put_slowly(self, item):
        put(self, item)
        if isinstance(item, Chunk) and item.stats is not None:
            time.sleep(0.05)  # the client is faster than this thread

    monkeypatch.setattr(Job, "put", put_slowly)
    with (
        opened(path, n_ctx=N_CTX, n_parallel=4) as model,
        app_client(app_of(model, NAME)) as client,
    ):
        answers = {text_of(chat(client)) for _ in range(6)}
        assert len(answers) == 1
        # The answer is longer than the prompt.
        answers = {text_of(chat(client, "a", max_tokens=100)) for _ in range(6)}
        assert len(answers) == 1
        slots = client.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [False] * 4
    assert sum(slot.get("job") is not None for slot in slots) == 2  # one for each prompt


@pytest.mark.skipif(not has_kernels(), reason="no kernels for this processor")
def test_repeatable_answers_have_the_same_probabilities(path):
    """There are more prompts than slots, so slots would keep rows of other prompts."""
    prompts = [f"number {number}, {LONG[: 40 * number]}" for number in range(6)]
    answers: list[set[str]] = [set() for _ in prompts]
    order = random.Random(1)
    sent = {"max_tokens": 4, "logprobs": True, "top_logprobs": 2, "repeatable": True}
    with (
        opened(path, n_ctx=N_CTX, n_parallel=3) as model,
        app_client(app_of(model, NAME)) as client,
    ):
        for _ in range(40):
            number = order.randrange(len(prompts))
            choice = chat(client, prompts[number], **sent).json()["choices"][0]
            answers[number].add(json.dumps([choice["message"]["content"], choice["logprobs"]]))
    assert [len(texts) for texts in answers] == [1] * len(prompts)


def test_props_report_number_of_slots(several):
    assert several.get("/props").json()["total_slots"] == SLOTS


def test_cache_prompt_false_rereads_prompt(several):
    chat(several, "anew. " + LONG)
    again = chat(several, "anew. " + LONG, cache_prompt=False).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["pop"]["n_pruned"] > 200
