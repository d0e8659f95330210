"""Anthropic's Messages API, validated with its client's types."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from pop_local.server import worker
from support.calls import opened
from support.chat_tools import DOUBLE, QWEN, TEMPLATES
from support.converted import tiny
from support.server_requests import LONG, NAME, chat, message_of
from support.serving import app_client, app_of

TOOL = {"name": "double", "input_schema": DOUBLE["function"]["parameters"]}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
ASKED = {"role": "user", "content": LONG}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("api"), chat_template=TEMPLATES[QWEN].read_text())
    with opened(path, n_ctx=8192) as model, app_client(app_of(model, NAME)) as client:
        yield client


def create(client: Any, **body: Any) -> Any:
    fixed = {"model": NAME, "messages": [ASKED], "temperature": 0, "max_tokens": 8}
    return client.post("/v1/messages", json=fixed | body)


def whole(response: Any) -> Any:
    from anthropic.types import Message  # here, since the import takes seconds

    assert response.status_code == 200, response.text
    return Message.model_validate_json(response.text)


def events(response: Any) -> list[Any]:
    from anthropic.types import RawMessageStreamEvent

    event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    parsed = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        if kind != "event: ping":
            parsed.append(event.validate_json(data.removeprefix("data: ")))
            assert kind == f"event: {parsed[-1].type}"
    return parsed


def test_message_equals_chat(client):
    message = whole(create(client))
    [block] = message.content
    assert block.type == "text" and block.text == message_of(chat(client))[0]["content"] != ""
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 8)


def test_system_and_blocks_become_chat_messages(client):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}]},
        {"role": "assistant", "content": "two"},
        ASKED,
    ]
    roles = [("system", "Be\nbrief."), ("user", "one"), ("assistant", "two"), ("user", LONG)]
    messages = [{"role": role, "content": content} for role, content in roles]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    [block] = whole(create(client, messages=turns, system=system)).content
    assert block.type == "text"
    assert block.text == message_of(chat(client, messages=messages))[0]["content"]


def test_stream_builds_the_complete_answer(client):
    streamed = events(create(client, stream=True))
    kinds = [event.type for event in streamed]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(e.delta.text for e in streamed if e.type == "content_block_delta")
    [block] = whole(create(client)).content
    assert block.type == "text" and text == block.text
    assert streamed[-2].delta.stop_reason == "max_tokens"
    assert streamed[-2].usage.output_tokens == 8
    assert streamed[0].message.usage.input_tokens > 0


def test_tool_call_accepts_result(client):
    body = FORCED | {"max_tokens": 600}
    message = whole(create(client, **body))
    [use] = message.content
    assert use.type == "tool_use" and use.name == "double" and message.stop_reason == "tool_use"
    arguments: Any = use.input
    assert arguments["n"] in range(10)
    streamed = events(create(client, **body, stream=True))
    parts = [event.delta.partial_json for event in streamed if event.type == "content_block_delta"]
    assert json.loads("".join(parts)) == arguments
    assert streamed[-2].delta.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "8"}]},
        {"type": "text", "text": "So?"},
    ]
    turn = [ASKED, {"role": "assistant", "content": [use.model_dump()]}]
    turn += [{"role": "user", "content": results}]
    again = whole(create(client, messages=turn, tools=[TOOL]))
    assert again.content[0].type == "text"
    assert again.usage.cache_read_input_tokens is not None
    n_read = again.usage.input_tokens + again.usage.cache_read_input_tokens
    assert n_read > message.usage.input_tokens


def test_built_in_tools_are_ignored_and_schema_is_enforced(client):
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert whole(create(client, tools=[search])).content == whole(create(client)).content
    form = {"format": {"type": "json_schema", "schema": {"enum": ["57"]}}}
    [block] = whole(create(client, output_config=form)).content
    assert block.type == "text" and block.text == '"57"'


def test_matched_stop_sequence_is_reported(client):
    [block] = whole(create(client)).content
    assert block.type == "text"
    message = whole(create(client, stop_sequences=["never", block.text[2:4]]))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", block.text[2:4])


def test_counts_tokens_of_messages(client):
    body = {"messages": [ASKED], "tools": [TOOL]}
    counted = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    usage = whole(create(client, tools=[TOOL])).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_log_estimates_remaining_time_during_prefill(client, monkeypatch, caplog):
    monkeypatch.setattr(worker, "_LOG_S", 0.0)
    with caplog.at_level("INFO", "pop_local.server"):
        whole(create(client, system="".join(map(str, range(700))), max_tokens=1))
    lines = [line for line in caplog.messages if line.endswith("s left")]
    assert lines and not [line for line in lines if "None" in line or "read 0 of" in line]


def test_changing_billing_header_costs_few_tokens(client):
    """Claude Code puts a header with a checksum, which changes, before its system prompt."""
    header = "x-anthropic-billing-header: cc_version=2.1.{}; cc_entrypoint=cli; cch={};"
    prompt = "".join(chr(97 + (index * index + index // 7) % 26) for index in range(3000))

    def n_read(version: str, checksum: str) -> int:
        system = [header.format(version, checksum), prompt]
        blocks = [{"type": "text", "text": text} for text in system]
        return whole(create(client, system=blocks, max_tokens=1)).usage.input_tokens

    first = n_read("37.abc", "c2e57")
    assert first > 3000
    for version, checksum in (("37.abc", "0a1bf"), ("37.abc", "d9f04"), ("137.abcd", "fffff")):
        assert n_read(version, checksum) < 120
