"""Tool calls by OpenAI's and Ollama's APIs, on a small random model."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pop_local.engine.chat_messages import Chunk, ToolCall, TurnStats
from pop_local.engine.decode import grammar
from pop_local.engine.prompt.prompt import Prompt
from pop_local.engine.tools.call_form import CallForm
from pop_local.engine.tools.reader import Piece
from pop_local.engine.tools.tool import Tool
from pop_local.engine.turn_options import TurnOptions
from pop_local.server.apis.ollama import OllamaChatReply
from pop_local.server.job_responses import _AnswerParser
from pop_local.server.replies import AnswerEnd
from pop_local.server.worker import Task
from support.calls import opened
from support.chat_tools import DOUBLE, QWEN, TEMPLATES, WEATHER, function
from support.child_limits import call_limit
from support.converted import tiny
from support.server_requests import NAME, chat, events, message_of
from support.serving import app_client, app_of
from support.synthetic import TEMPLATE

TOOLS = [WEATHER, DOUBLE]
TIMES = ("queued_s", "ttft_s", "encode_s", "prefill_s", "decode_s")
SEALED = WEATHER["function"]["parameters"] | {"additionalProperties": False}
FORCED = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 600}
CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
TURN: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "It rains."},
]
BOMB = {"type": "object", "properties": {f"p{n}": {} for n in range(10_000)}}
NESTED: dict[str, Any] = {}
for _ in range(150):
    NESTED = {"properties": {"a": NESTED}}


@pytest.fixture(scope="module", params=["native", "text"])
def client(request, tmp_path_factory):
    template = TEMPLATES[QWEN].read_text() if request.param == "native" else TEMPLATE
    path = tiny(tmp_path_factory.mktemp("tools"), chat_template=template)
    with opened(path, n_ctx=8192) as model, app_client(app_of(model, NAME)) as client:
        yield client


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = [call["function"] for call in message["tool_calls"]]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def joined(streamed: list[Any]) -> tuple[list[dict[str, Any]], str]:
    """Join a stream's deltas as OpenAI's client does; return its calls and content."""
    calls: dict[int, dict[str, Any]] = {}
    content = ""
    for event in streamed:
        delta = event["choices"][0]["delta"]
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls) and part["type"] == "function"
                calls[part["index"]] = {"id": part["id"], "function": dict(part["function"])}
            else:
                arguments = part["function"]["arguments"]
                calls[part["index"]]["function"]["arguments"] += arguments
    return [*calls.values()], content


def test_required_call_matches_a_tool_schema(client):
    message, reason = message_of(chat(client, **FORCED, parallel_tool_calls=False))
    [(name, arguments)] = called(message)
    assert (message["content"], reason) == (None, "tool_calls")
    assert message["tool_calls"][0]["id"] and message["tool_calls"][0]["type"] == "function"
    if name == "get_weather":
        assert arguments["city"] in ("Paris", "Rome")
    else:
        assert arguments["n"] in range(10)


def test_streamed_calls_equal_complete_calls(client):
    whole, _ = message_of(chat(client, **FORCED, parallel_tool_calls=False))
    streamed = events(chat(client, **FORCED, parallel_tool_calls=False, stream=True))
    calls, content = joined(streamed)
    assert called({"tool_calls": calls}) == called(whole) and content == ""
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_named_tool_is_called(client):
    choice = {"type": "function", "function": {"name": "double"}}
    body = FORCED | {"tool_choice": choice, "parallel_tool_calls": False}
    assert [name for name, _ in called(message_of(chat(client, **body))[0])] == ["double"]


def test_parallel_calls_have_distinct_ids(client):
    streamed = events(
        chat(client, **FORCED | {"max_tokens": 600}, temperature=1, seed=1, stream=True)
    )
    calls, _ = joined(streamed)
    assert len({call["id"] for call in calls}) == len(calls) > 0


def test_token_limit_cuts_off_a_call(client):
    message, reason = message_of(chat(client, **FORCED | {"max_tokens": 3}))
    assert reason == "length" and "tool_calls" not in message


@pytest.mark.parametrize("body", [{"tool_choice": "auto"}, {"tool_choice": "none"}, {}])
def test_answer_without_call_is_content(client, body):
    message, reason = message_of(chat(client, tools=TOOLS, **body))
    assert reason == "length" and message["content"] and "tool_calls" not in message
    content = joined(events(chat(client, tools=TOOLS, stream=True, **body)))[1]
    assert content == message["content"]


def test_tool_choice_none_omits_tools(client):
    lengths = [
        chat(client, tools=TOOLS, tool_choice=choice).json()["usage"]["prompt_tokens"]
        for choice in ("auto", "none", "required")
    ]
    assert lengths[0] == lengths[2] > lengths[1]


def test_second_turn_reads_only_call_and_result(client):
    first = chat(client, messages=TURN[:1], tools=TOOLS).json()["usage"]
    second = chat(client, messages=TURN, tools=TOOLS).json()["usage"]
    n_read = second["prompt_tokens"] - second["prompt_tokens_details"]["cached_tokens"]
    # The tail of a prompt is read again, since it must be full.
    assert n_read <= second["prompt_tokens"] - first["prompt_tokens"] + 40
    assert message_of(chat(client, messages=TURN))[0]["content"]


def test_logprobs_cover_all_tokens(client):
    response = chat(client, **FORCED | {"max_tokens": 12}, logprobs=True)
    assert len(response.json()["choices"][0]["logprobs"]["content"]) == 12
    streamed = events(chat(client, **FORCED | {"max_tokens": 12}, logprobs=True, stream=True))
    entries = [event["choices"][0]["logprobs"] for event in streamed]
    assert sum(len(entry["content"]) for entry in entries if entry) == 12


def test_usage_lists_ignored_tool_keywords(client):
    tool = function("tags", values={"type": "array", "uniqueItems": True, "maxItems": 1})
    usage = chat(client, tools=[tool], max_tokens=2).json()["usage"]
    assert usage["pop"]["ignored"] == ["uniqueItems"]


def test_tool_beyond_limits_is_refused(client):
    with call_limit(0.5, *grammar._children.queue):
        refused = chat(client, tools=[function("a", b=BOMB)])
    assert refused.status_code == 400, refused.text


def test_schema_bombs_return_400(client):
    nested: list[Any] = [TURN[0], {**TURN[1], "content": "[" * 20_000}, TURN[2]]
    hostile: list[dict[str, Any]] = [
        {"tools": [function("a", b=NESTED)]},
        {"tools": [WEATHER], "messages": nested},
        {"tools": [function(f"tool_{n}", a={"pattern": "(a{1,900}){1,900}"}) for n in range(50)]},
    ]
    for body in hostile:
        assert chat(client, **body, max_tokens=2).status_code in (200, 400)
    assert message_of(chat(client))[0]["content"]


def test_ollama_calls_have_object_arguments(client):
    few = {"temperature": 0, "num_predict": 4}
    fields = {"model": NAME, "messages": TURN[:1], "tools": [DOUBLE], "options": few}
    answer = client.post("/api/chat", json=fields | {"stream": False})
    assert "tool_calls" not in answer.json()["message"]
    call = {"function": {"name": "double", "arguments": {"n": 1}}}
    messages = [
        TURN[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    for stream in (False, True):
        answer = client.post("/api/chat", json=fields | {"messages": messages, "stream": stream})
        assert answer.status_code == 200, answer.text


def test_ollama_sends_complete_calls_last():
    pieces = [
        Piece("Hm."),
        Piece(call=ToolCall("a", "double", "")),
        Piece(call=ToolCall("", "", '{"n":')),
        Piece(call=ToolCall("", "", " 2}")),
        Piece(call=ToolCall("b", "get_weather", '{"ci'), index=1),
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "pop": dict.fromkeys(TIMES, 0.0)}
    end = AnswerEnd("length", "", usage)
    served: Any = SimpleNamespace(name=NAME)
    reply = OllamaChatReply(served)
    reply.begin(0, Task(Prompt([1]), TurnOptions(), reason="test"))
    calls = [{"function": {"name": "double", "arguments": {"n": 2}}}]
    whole = reply.whole(replace(end, pieces=pieces))["message"]
    assert whole == {"role": "assistant", "content": "Hm.", "tool_calls": calls}
    events = [event for piece in pieces for event in reply.pieces(piece, ())]
    update, last = reply.ending(end)
    assert [event["message"]["content"] for event in events] == ["Hm."]
    assert update["message"]["tool_calls"] == calls and last["done_reason"] == "length"


def test_stop_string_does_not_cut_a_call(client):
    body = FORCED | {"parallel_tool_calls": False}
    whole, _ = message_of(chat(client, **body))
    message, reason = message_of(chat(client, **body, stop=['"name', "{", "arguments"]))
    assert called(message) == called(whole) and reason == "tool_calls"


def test_high_temperature_keeps_required_call(client):
    for seed in range(3):
        body = FORCED | {"temperature": 10, "seed": seed, "max_tokens": 400}
        message, _ = message_of(chat(client, **body))
        assert "tool_calls" in message, message


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/A", "$defs": {"A": SEALED}},
        {"anyOf": [SEALED]},
        {"allOf": [SEALED], "required": ["city"]},
    ],
)
def test_tool_schema_may_contain_references(client, schema):
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    body = FORCED | {"tools": [tool], "parallel_tool_calls": False, "max_tokens": 600}
    [(_, arguments)] = called(message_of(chat(client, **body))[0])
    assert arguments["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("name", ["call", "calls"])
def test_tool_may_have_name_of_grammar_rule(client, name):
    body = FORCED | {"tools": [function(name, n={"enum": [1, 2]})], "parallel_tool_calls": False}
    [(function_name, arguments)] = called(message_of(chat(client, **body))[0])
    assert (function_name, arguments["n"] in (1, 2)) == (name, True)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_matches_schema_despite_tools(client, stream):
    form = {"type": "json_object", "schema": {"enum": ["57", "58"]}}
    fields = {"tools": TOOLS, "response_format": form, "max_tokens": 600, "stream": stream}
    # A bias makes the random model choose the schema's first character.
    response = chat(client, "a", **fields, logit_bias={'"': 50})
    message, _ = ({}, "") if stream else message_of(response)
    content = joined(events(response))[1] if stream else message["content"]
    assert content in ('"57"', '"58"')


def test_tool_calls_are_allowed_with_schema(client):
    form = {"type": "json_object", "schema": {"enum": ["57"]}}
    fields = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 600}
    message, reason = message_of(chat(client, **fields, response_format=form))
    assert called(message) and reason == "tool_calls"


def test_required_call_takes_precedence_over_schema(client):
    form = {"type": "json_object", "schema": {"enum": ["57"]}}
    message, reason = message_of(chat(client, **FORCED, response_format=form))
    assert called(message) and reason == "tool_calls"
    content = message_of(chat(client, tools=TOOLS, tool_choice="none", response_format=form))
    assert content[0]["content"] == '"57"'


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_called(client, mode):
    choice = {"mode": mode, "tools": [{"type": "function", "function": {"name": "double"}}]}
    fields = {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": choice}}
    message, _ = message_of(chat(client, **fields, max_tokens=600 if mode == "required" else 8))
    if mode == "required":
        assert [name for name, _ in called(message)] == ["double"]
    every = chat(client, tools=TOOLS, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert chat(client, **fields, max_tokens=1).json()["usage"]["prompt_tokens"] == every


@pytest.mark.parametrize(
    ("text", "reason", "note"),
    [
        ("I do it.\n```python\ndouble(n=4)\n```", "tool_calls", " tokens generated"),
        (
            "double(n=4)",
            "stop",
            'no tool call: the call to "double" has an unknown format or is followed by text',
        ),
        ("I double it.", "stop", " tokens generated"),
    ],
)
def test_log_states_why_an_answer_contains_no_call(text, reason, note):
    form = CallForm((Tool("double", "", DOUBLE["function"]["parameters"]),))
    task = Task(Prompt([1]), TurnOptions(calls=form))
    job: Any = SimpleNamespace(task=task, queued_s=0.0, id="1")
    state: Any = SimpleNamespace()
    parser = _AnswerParser(job)
    last = Chunk("", TurnStats(1, 0, 0, 1, 0.0, 0.0, 5, 0.0, "stop"))

    async def parse() -> None:
        await parser.parse([Chunk(text), last])
        await parser.finish()

    asyncio.run(parse())
    assert parser.end(state, job, last).reason == reason
    assert state.note.endswith(note)
