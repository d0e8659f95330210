"""OpenAI's Responses API, validated with its client's types."""

import json
from typing import Annotated, Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import Field, TypeAdapter

from support.calls import opened
from support.chat_tools import DOUBLE, QWEN, TEMPLATES
from support.converted import tiny
from support.server_requests import LONG, NAME, chat, message_of
from support.serving import app_client, app_of

EVENT: TypeAdapter[Any] = TypeAdapter(Annotated[ResponseStreamEvent, Field(discriminator="type")])
TOOL = {"type": "function", **DOUBLE["function"]}
NAN = float("nan")
FORCED = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("api"), chat_template=TEMPLATES[QWEN].read_text())
    with opened(path, n_ctx=8192) as model, app_client(app_of(model, NAME)) as client:
        yield client


def create(client: Any, content: Any = LONG, **body: Any) -> Any:
    fixed = {"model": NAME, "input": content, "temperature": 0, "max_output_tokens": 8}
    return client.post("/v1/responses", json=fixed | body)


def whole(response: Any) -> Response:
    assert response.status_code == 200, response.text
    parsed: Response = Response.model_validate_json(response.text)
    return parsed


def events(response: Any) -> list[Any]:
    parsed = []
    for block in response.text.strip().split("\n\n"):
        if not block.startswith(":"):
            kind, data = block.split("\n")
            parsed.append(EVENT.validate_json(data.removeprefix("data: ")))
            assert kind == f"event: {parsed[-1].type}"
    assert [event.sequence_number for event in parsed] == [*range(len(parsed))]
    return parsed


def test_response_equals_chat(client):
    answer = whole(create(client))
    assert answer.output_text == message_of(chat(client))[0]["content"] != ""
    assert (answer.status, answer.output[0].type) == ("incomplete", "message")
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage and answer.usage.output_tokens == 8
    assert create(client).json()["usage"]["pop"]["reading"] in ("short", None)


def test_instructions_and_items_become_chat_messages(client):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": "two"},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": LONG},
    ]
    roles = [("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", LONG)]
    messages = [{"role": role, "content": content} for role, content in roles]
    answer = whole(create(client, items, instructions="Be brief."))
    assert answer.output_text == message_of(chat(client, messages=messages))[0]["content"]


def test_stream_builds_the_complete_answer(client):
    streamed = events(create(client, stream=True))
    assert [event.type for event in streamed[:4]] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
    ]
    added = next(event for event in streamed if event.type == "response.output_item.added")
    assert added.item.content == []
    text = "".join(e.delta for e in streamed if e.type == "response.output_text.delta")
    assert streamed[-1].type == "response.incomplete"
    assert text == streamed[-1].response.output_text == whole(create(client)).output_text
    assert streamed[-1].response.usage.output_tokens == 8


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "double"}])
def test_response_calls_tool(client, choice):
    body = FORCED | {"tool_choice": choice, "max_output_tokens": 600}
    [call] = whole(create(client, **body)).output
    assert call.type == "function_call" and call.name == "double"
    assert json.loads(call.arguments)["n"] in range(10)
    streamed = events(create(client, **body, stream=True))
    deltas = [e for e in streamed if e.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == call.arguments
    done = next(event for event in streamed if event.type == "response.output_item.done")
    assert done.item.arguments == call.arguments and done.item.call_id
    assert streamed[-1].type == "response.completed"


def test_previous_response_id_continues(client):
    body = FORCED | {"max_output_tokens": 600}
    first = whole(create(client, **body))
    call: Any = first.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18"}
    follow = {"tools": [TOOL], "max_output_tokens": 8}
    second = whole(create(client, [result], previous_response_id=first.id, **follow))
    sent = [{"role": "user", "content": LONG}, call.model_dump(), result]
    assert second.output_text == whole(create(client, sent, **follow)).output_text != ""
    assert second.usage and first.usage and second.usage.input_tokens > first.usage.input_tokens
    third = whole(create(client, "And?", previous_response_id=second.id, **follow))
    assert third.usage and third.usage.input_tokens > second.usage.input_tokens


def test_schema_is_enforced(client):
    form = {"type": "json_schema", "name": "a", "schema": {"enum": ["57"]}}
    assert whole(create(client, text={"format": form})).output_text == '"57"'


def test_built_in_tools_are_ignored(client):
    tools = [{"type": "web_search"}, TOOL, {"type": "image_generation"}]
    [call] = whole(create(client, **FORCED | {"tools": tools, "max_output_tokens": 600})).output
    assert call.type == "function_call"
    assert whole(create(client, tools=tools[:1])).output_text == whole(create(client)).output_text


def test_omitted_tools_are_named(client):
    """Codex sends a namespace of tools, and tools that only OpenAI can run."""
    inner = {**TOOL, "name": "spawn_agent"}
    space = {"type": "namespace", "name": "multi_agent_v1", "description": "", "tools": [inner]}
    answer = create(client, tools=[TOOL, space, {"type": "web_search", "external_web_access": 0}])
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["pop"]["ignored"] == ["multi_agent_v1", "web_search"]
    assert [tool["name"] for tool in answer.json()["tools"]] == ["double"]
    assert create(client).json()["usage"]["pop"]["ignored"] == []
    for wrong in ("double", [TOOL, 1], [{"type": "function"}]):
        assert create(client, tools=wrong).status_code == 400


@pytest.mark.parametrize("missing", [{}, {"call_id": None}])
def test_result_without_call_id_belongs_to_the_open_call(client, missing):
    def items(named: Any, result: Any) -> list[Any]:
        call = {"type": "function_call", "name": "double", "arguments": '{"n": 4}'}
        output = {"type": "function_call_output", "output": "8"}
        return [{"role": "user", "content": LONG}, call | named, output | result]

    named = {"call_id": "call_1"}
    answers = [create(client, items(*ids)) for ids in ((named, named), (named, missing))]
    answers.append(create(client, items(missing, missing)))
    texts = {whole(answer).output_text for answer in answers}
    n_read = {answer.json()["usage"]["input_tokens"] for answer in answers}
    assert len(texts) == len(n_read) == 1


def test_store_false_stores_nothing(client):
    first = whole(create(client, store=False))
    assert create(client, "And?", previous_response_id=first.id).status_code == 400
