"""Invalid requests: all errors have the same shape and a reason."""

import asyncio
import json
import re

import pytest
from prometheus_client import generate_latest
from pydantic import TypeAdapter, ValidationError

from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.api_errors import ApiError
from pop_local.server.apis.llama_server import DetokenizeBody, InfillBody
from pop_local.server.apis.ollama import OllamaChat
from pop_local.server.metrics import Metrics
from pop_local.server.request_bodies import ChatBody, Prompts
from pop_local.server.worker import Task, Worker
from support.calls import opened
from support.program import called
from support.server_requests import BOMB, N_CTX, NAME, chat, complete, text_of
from support.serving import app_client, app_of


@pytest.fixture(scope="module")
def model(path):
    """A model for applications that are not started."""
    model = opened(path)
    yield model
    model.close()


REFERRING = {
    "type": "json_schema",
    "json_schema": {"schema": {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}}}},
}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.image_url: Field required",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: the content must be a string or a list of parts",
        ),
        (HELLO | {"n": 0}, "n: Input should be greater"),
        (HELLO | {"add_generation_prompt": False}, "requires continue_final_message: true"),
        (HELLO | {"mirostat": 2}, "mirostat is not supported"),
        (HELLO | {"n_cmpl": 2}, "n_cmpl must be 1"),
        (HELLO | {"reasoning_effort": "none"}, "reasoning cannot be disabled"),
        (HELLO | {"reasoning_budget_tokens": 0}, "reasoning_budget_tokens must be -1"),
        (HELLO | {"repeat_last_n": 0}, "repeat_last_n must be 64"),
        (HELLO | {"adaptive_target": 0.5}, "adaptive_target must be -1"),
        (HELLO | {"t_max_predict_ms": 500}, "t_max_predict_ms must be -1"),
        (HELLO | {"samplers": ["top_k"]}, "samplers is not supported"),
        (HELLO | {"n_indent": 4}, "n_indent is not supported"),
        (HELLO | {"include_stop_str_in_output": True}, "include_stop_str_in_output is not"),
        (HELLO | {"prompt_logprobs": 0}, "prompt_logprobs must be null"),
        (HELLO | {"repetition_penalty": 99}, "repetition_penalty"),
        (HELLO | {"n_predict": 0}, "n_predict"),
        (HELLO | {"response_format": REFERRING}, "Pointer '/$defs/B' does not exist"),
        (HELLO | {"guided_choice": ["a"]}, "guided_choice is not supported"),
        (HELLO | {"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        (HELLO | {"logit_bias": {"999": 1}}, "must be between 0 and 383"),
        (HELLO | {"logit_bias": {"-5": 1}}, "must be between 0 and 383"),
        (HELLO | {"logit_bias": {"9" * 12: 1}}, "must be between 0 and 383"),
        (HELLO | {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (HELLO | {"logit_bias": {"5": "much"}}, "logit_bias.0.1"),
        (HELLO | {"logit_bias": {"5": 1e300}}, "logit_bias.0.1"),
        (HELLO | {"logit_bias": [[5, 1]] * 1025}, "logit_bias"),
        (HELLO | {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs is"),
        (HELLO | {"json_schema": {"type": "hiccup"}}, "hiccup"),
        (HELLO | {"continue_final_message": True}, "a text-only assistant message at the end"),
        (
            HELLO | {"continue_final_message": True, "add_generation_prompt": True},
            "conflicts with add_generation_prompt",
        ),
        (HELLO | {"temperature": -1}, "temperature"),
        (HELLO | {"top_p": 2}, "top_p"),
        (HELLO | {"max_tokens": 0}, "max_tokens"),
        (HELLO | {"max_tokens": "many"}, "max_tokens"),
        (HELLO | {"stop": [""]}, "stop"),
        (HELLO | {"stop": 0}, "stop"),
        (HELLO | {"top_logprobs": 3}, "top_logprobs requires logprobs"),
        (HELLO | {"top_logprobs": 30, "logprobs": True}, "top_logprobs"),
        (HELLO | {"response_format": {"type": "xml"}}, "response_format"),
        (HELLO | {"response_format": {"type": "json_schema"}}, "send the schema as"),
        (
            HELLO
            | {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "string", "pattern": "(?=a)"}},
                }
            },
            "pattern",
        ),
        (HELLO | {"grammar": "nonsense"}, "not valid GBNF"),
        (HELLO | {"grammar": 'root ::= "ab" x\nx ::= x "c"'}, "no token"),
    ],
)
def test_invalid_chats_return_400(client, body, reason):
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": 5}, "prompt: send one text or a list"),
        ({"prompt": ["a", 1.5]}, "prompt: send one text or a list"),
        ({"prompt": ["a", [[1]]]}, "prompt: send one text or a list"),
        ({"prompt": ["a", 384]}, "must be between 0 and 383"),
        ({"prompt": {"content": [{"type": "text"}]}}, "prompt: send one text"),
        ({"prompt": ["a"] * 64, "n": 3}, "must not exceed 128"),
        ({"prompt": "a", "n": 129}, "n: Input should be less"),
        ({"prompt": [[1], []]}, "empty"),
        ({"prompt": [5, 384]}, "must be between 0 and 383"),
        ({"prompt": [-1]}, "must be between 0 and 383"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": "x", "suffix": "y"}, "no fill-in-the-middle"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "best_of": 3}, "best_of must be 1"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "add_special_tokens": False}, "add_special_tokens must be true"),
    ],
)
def test_invalid_completions_return_400(client, body, reason):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": [0] * 20_000}),
        (ChatBody, {"messages": [{"role": "user"}] * 20_000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}, {}]}] * 20_000}),
        (Prompts, [0.5] * 20_000),
        (Prompts, [[0.5, 0.5]] * 20_000),
        (Prompts, [["a"]] * 20_000),
        (OllamaChat, {"messages": [0] * 20_000}),
        (OllamaChat, {"messages": [{"role": "user", "images": [0] * 60}] * 9_000}),
        (InfillBody, {"input_extra": [0] * 900}),
        (DetokenizeBody, {"tokens": ["a"] * 20_000}),
    ],
)
def test_validation_stops_at_first_error(kind, body):
    """Each error takes a kilobyte, and validation blocks the event loop."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_json(json.dumps(body))
    assert caught.value.error_count() <= 4  # a union has four types


def test_stream_error_is_sent_as_event(client):
    response = complete(client, grammar='root ::= "ab" x\nx ::= x "c"', stream=True)
    error = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    assert "no token" in error["message"]
    assert text_of(complete(client))


def test_oversized_prompt_error_contains_token_counts(client):
    response = complete(client, "x" * 5000)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "500" in error["message"] and str(N_CTX) in error["message"]
    assert "contexts of 4,096 tokens and is unreliable on longer prompts" in error["message"]
    shorter = complete(client, "x" * (N_CTX + 100)).json()["error"]["message"]
    assert re.search(r"restart the server with --ctx \d+$", shorter)


def test_default_model_is_reported_in_header_and_log(client, caplog):
    caplog.set_level("INFO", "pop_local.server")
    own = chat(client, model=NAME.upper())
    assert "x-model" not in own.headers
    other = chat(client, model="gpt-4o\n" + "x" * 200)
    assert text_of(other) == text_of(own)
    assert other.headers["x-model"] == other.json()["model"] == NAME
    assert "requested model 'gpt-4o\\nxxx" in caplog.messages[-1]
    assert len(caplog.messages[-1]) < 400
    assert client.get("/v1/models/gpt-4o").status_code == 404


def test_header_encodes_model_name(model):
    named = app_client(app_of(model, "a\nb \u20ac"))
    other = named.post("/api/show", json={"model": "gpt-4o"})
    assert other.headers["x-model"] == "a%0Ab %E2%82%AC"


def test_grammar_bomb_returns_400(path):
    model = opened(path, n_ctx=N_CTX)
    with app_client(app_of(model, NAME)) as client:
        response = complete(client, grammar=f'root ::= a0 "z"\n{BOMB[:-2]}"a"')
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_grammar"
        assert client.get("/health").status_code == 200
        # This grammar doubles llama.cpp's stacks with each token.
        endless = complete(client, grammar='root ::= "a" root "b" | "a" root "c"', max_tokens=60)
        assert set(text_of(endless)) == {"a"}
        assert text_of(complete(client))
    model.close()


def test_full_queue_returns_503(path):
    with app_client(app_of(opened(path), NAME, max_waiting=0)) as client:
        response = complete(client)
        assert response.status_code == 503
        assert "try again later" in response.json()["error"]["message"]
        assert "retry-after" in response.headers


def test_command_sets_queue_length(path, monkeypatch):
    task = Task(Prompt([1], ()), TurnOptions(), reason="test")

    async def fill(worker: Worker) -> None:
        for _ in range(3):
            worker.submit(task)
        with pytest.raises(ApiError, match=r"queue is full \(3 requests\)"):
            worker.submit(task)

    def fill_instead(app, listening):
        (served,) = app.state.models.loaded
        asyncio.run(fill(served.worker))

    monkeypatch.setattr("pop_local.server.app.run_app", fill_instead)
    monkeypatch.setattr("pop_local.server.app.log_to_stderr", lambda _: None)
    assert called("serve", path, "--port", 0, "--max-waiting", 3).returncode == 0


def test_disconnected_request_leaves_the_queue(full):
    metrics = Metrics()
    worker = Worker(full, metrics, max_waiting=2)  # not started, so requests queue
    metrics.queue.set_function(worker.n_waiting)
    task = Task(Prompt([1], ()), TurnOptions(), reason="test")

    async def hang_up() -> None:
        first, second = (worker.submit(task) for _ in range(2))
        with pytest.raises(ApiError, match=r"queue is full \(2 requests\)"):
            worker.submit(task)
        first.cancel()
        assert b"pop_queue_length 1.0" in generate_latest(metrics.registry)
        third = worker.submit(task)
        assert b"pop_queue_length 2.0" in generate_latest(metrics.registry)
        with pytest.raises(ApiError, match=r"queue is full \(2 requests\)"):
            worker.submit(task)
        worker.stop()
        worker.start()
        for job in (second, third):
            with pytest.raises(ApiError, match="stopping"):
                await anext(job.batches(pause_s=1))

    asyncio.run(hang_up())
    worker.join()
    assert b"pop_queue_length 0.0" in generate_latest(metrics.registry)


def test_unconverted_model_reports_reason(tmp_path):
    from support.synthetic import make_gguf

    model = opened(make_gguf(tmp_path / "plain.gguf", "llama"))
    with app_client(app_of(model, NAME)) as client:
        pop = complete(client).json()["usage"]["pop"]
        assert (pop["n_pruned"], pop["reason"]) == (0, "the model has no pruning keys")
        assert complete(client, pop=False).status_code == 200
        assert complete(client, pop=True).status_code == 400
