"""Replay recorded sessions of coding agents against `pop-local serve`.

docs/agents.md lists the versions.
"""

import json
from typing import Any

import httpx2
import pytest

from support.agent_sessions import SESSIONS, requests_of
from support.chat_tools import QWEN, TEMPLATES
from support.converted import tiny
from support.serving import PATIENCE_S, served

# A byte-level vocabulary has a token per character, so removed texts are shortened.
MOST, N_CTX = 40, 32768


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("agents"), chat_template=TEMPLATES[QWEN].read_text())
    with served(path, "--ctx", N_CTX, "--parallel", 1) as server:
        yield server


def sent(server: Any, path: str, body: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return a stream's lines and events, or those of a complete answer."""
    limit = "max_output_tokens" if path.endswith("/responses") else "max_tokens"
    answer = httpx2.post(server.root + path, json=body | {limit: 4}, timeout=PATIENCE_S * 4)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return [], [answer.json()]
    lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return lines, [json.loads(each) for each in data]


def check_chat(body: dict[str, Any], lines: list[str], events: list[Any]) -> dict[str, Any]:
    """Check a chat completion's events, and return its usage."""
    if not lines:
        [whole] = events
        assert whole["choices"][0]["message"]["role"] == "assistant"
        return whole["usage"]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    counted = (body.get("stream_options") or {}).get("include_usage")
    *pieces, last = events[:-1] if counted else events
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert last["choices"][0]["finish_reason"] in ("length", "stop", "tool_calls")
    assert len({event["id"] for event in events}) == 1
    return events[-1]["usage"] if counted else {}


def check_response(lines: list[str], events: list[Any]) -> dict[str, Any]:
    """Check a response's events, and return its usage in the form of chat completions."""
    kinds = [event["type"] for event in events]
    assert lines[::2] == [f"event: {kind}" for kind in kinds]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    usage = events[-1]["response"]["usage"]
    cached = usage["input_tokens_details"]
    return usage | {"prompt_tokens": usage["input_tokens"], "prompt_tokens_details": cached}


@pytest.mark.parametrize("file", SESSIONS, ids=lambda file: file.stem)
def test_recorded_session_is_answered(server, file):
    """Check that each later request of a conversation reuses the rows of its predecessor."""
    before: list[Any] = []
    n_before = n_reused = 0
    for path, body in requests_of(file, MOST):
        lines, events = sent(server, path, body)
        is_chat = path.endswith("/chat/completions")
        usage = check_chat(body, lines, events) if is_chat else check_response(lines, events)
        turns = body["messages" if is_chat else "input"]
        if before and turns[: len(before)] == before:
            n_reused += 1
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0.9 * n_before
        if usage:
            before, n_before = turns, usage["prompt_tokens"]
    assert n_reused or file.stem == "aider"


def test_codex_receives_the_omitted_tools(server):
    path, body = requests_of(next(file for file in SESSIONS if file.stem == "codex"), MOST)[0]
    omitted = [tool.get("name", tool["type"]) for tool in body["tools"] if "parameters" not in tool]
    assert omitted
    _, events = sent(server, path, body)
    assert events[-1]["response"]["usage"]["pop"]["ignored"][-len(omitted) :] == omitted
