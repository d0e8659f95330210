"""Harmful requests through each door: they are refused, and the next one is answered."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.asked import BOMB, N_CTX, chat, text_of

SAID = [{"role": "user", "content": "a"}]
# Right as they are.
CHAT, PROMPT = {"messages": SAID}, {"prompt": "a"}
DOORS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": PROMPT,
    "/api/chat": CHAT,
    "/api/generate": PROMPT,
    "/api/show": {},
    "/completion": PROMPT,
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": CHAT | {"max_tokens": 1},
    "/v1/messages/count_tokens": CHAT,
    "/v1/embeddings": {"input": "a"},
    "/api/embed": {"input": "a"},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [5]},
}
# A text that is too long for the context, or a body that is too long for anything.
TEXTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "/v1/chat/completions": ("messages", lambda text: [{"role": "user", "content": text}]),
    "/v1/completions": ("prompt", str),
    "/api/chat": ("messages", lambda text: [{"role": "user", "content": text}]),
    "/api/generate": ("prompt", str),
    "/completion": ("prompt", str),
    "/infill": ("input_prefix", str),
    "/v1/responses": ("input", str),
    "/v1/messages": ("messages", lambda text: [{"role": "user", "content": text}]),
    "/v1/messages/count_tokens": ("messages", lambda text: [{"role": "user", "content": text}]),
    "/v1/embeddings": ("input", str),
    "/api/embed": ("input", str),
}
SCHEMA = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}}}
DEEP = {"type": "string", "pattern": "(a?){1000}" * 20 + "(?=a)"}


def message(response) -> str:
    error = response.json()["error"]
    return error if isinstance(error, str) else error["message"]


def post(client, door, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(door, content=content)


@pytest.fixture(autouse=True)
def _answers_afterwards(client):
    yield
    assert text_of(chat(client, "hello", max_tokens=1)) is not None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[1, 2]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (b'{"a":' * 15_000, 400),
        (b'{"x": "' + b"y" * 200_000 + b'"}', 413),
        (b'{"images": [' + b'"",' * 60_000 + b'""]}', 413),
        (b'{"images": ["a\\" "' + b",[]" * 60_000 + b"]}", 413),
    ],
    ids=["empty", "list", "bytes", "deep", "deep-objects", "long", "images", "escapes"],
)
def test_what_is_no_request_is_refused(client, door, body, status):
    response = client.post(door, content=body)
    assert response.status_code == status, response.text
    assert message(response)


@pytest.mark.parametrize("door", TEXTS)
def test_a_text_beyond_the_context_says_so(client, filler, door):
    name, given = TEXTS[door]
    body = DOORS[door] | {name: given("x" * 5000)}
    response = post(filler[1] if door == "/infill" else client, door, body)
    assert response.status_code == 400
    assert f"are limited to {N_CTX}" in message(response)


@pytest.mark.parametrize(
    ("door", "field"),
    [
        ("/completion", {"grammar": f'root ::= a0 "z"\n{BOMB[:-2]}"a"'}),
        ("/completion", {"json_schema": SCHEMA}),
        ("/completion", {"json_schema": DEEP}),
        ("/api/chat", {"format": SCHEMA}),
        ("/api/chat", {"format": DEEP}),
        ("/api/generate", {"format": SCHEMA}),
        ("/api/generate", {"format": SCHEMA, "raw": True}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
        ("/v1/messages", {"tools": [{"name": "a", "input_schema": DEEP}]}),
    ],
)
def test_a_form_that_would_take_all_memory_is_400(client, door, field):
    response = post(client, door, DOORS[door] | field)
    assert response.status_code == 400, response.text
    assert message(response)


def test_a_thread_each_splits_texts_while_others_are_answered(client):
    body = {"content": "\U00012345" * 5_000}
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(post(client, "/tokenize", body).status_code))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert client.get("/health").status_code == 200
    for thread in threads:
        thread.join(60)
    assert found == [200] * 4
