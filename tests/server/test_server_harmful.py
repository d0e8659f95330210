"""Harmful requests to each path: the server refuses them and answers the next one."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.server_requests import BOMB, N_CTX, chat, text_of

SAID = [{"role": "user", "content": "a"}]
# Valid requests.
CHAT, PROMPT = {"messages": SAID}, {"prompt": "a"}
APIS: dict[str, dict[str, Any]] = {
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
# The field that holds a long text in each request.
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


def post(client, endpoint, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(endpoint, content=content)


@pytest.fixture(autouse=True)
def _answers_afterwards(client):
    yield
    assert text_of(chat(client, "hello", max_tokens=1)) is not None


@pytest.mark.parametrize("endpoint", APIS)
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
def test_malformed_bodies_are_refused(client, endpoint, body, status):
    response = client.post(endpoint, content=body)
    assert response.status_code == status, response.text
    assert message(response)


@pytest.mark.parametrize("endpoint", TEXTS)
def test_error_for_text_beyond_context(client, filler, endpoint):
    name, given = TEXTS[endpoint]
    body = APIS[endpoint] | {name: given("x" * 5000)}
    response = post(filler[1] if endpoint == "/infill" else client, endpoint, body)
    assert response.status_code == 400
    assert f"are limited to {N_CTX}" in message(response)


@pytest.mark.parametrize(
    ("endpoint", "field"),
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
def test_memory_bomb_in_schema_is_400(client, endpoint, field):
    response = post(client, endpoint, APIS[endpoint] | field)
    assert response.status_code == 400, response.text
    assert message(response)


def test_tokenization_blocks_no_other_request(client):
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
