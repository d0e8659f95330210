"""Damaged requests to each API: the server returns a 4xx with a reason, or an answer."""

import json
import logging
import random
from typing import Any

import pytest

from pop_base.errors import PopError
from support.calls import opened
from support.campaign import campaign
from support.chat_tools import DOUBLE, QWEN, TEMPLATES, WEATHER
from support.converted import tiny
from support.mutants import mutated_bytes, mutated_json
from support.server_requests import NAME
from support.serving import app_client, app_of

pytestmark = pytest.mark.slow

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a{2}$"}}}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"]}
ASKED = SAMPLING | {"max_tokens": 2, "repeat_penalty": 1.1, "frequency_penalty": 0.5, "pop": True}
PARTS = [{"type": "text", "text": "who?"}]
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
CHAT = {"model": NAME, "messages": SAID, "logprobs": True, "top_logprobs": 2} | ASKED
TEXT = {"model": NAME, "prompt": "once", "logprobs": 2, "n": 1} | ASKED
FUNCTION = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
CALLED = [
    *SAID,
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": FUNCTION}]},
    {"role": "tool", "tool_call_id": "a", "content": "rain"},
]
NAMED = {"type": "function", "function": {"name": "double"}}
TOOLS = {"messages": CALLED, "tools": [WEATHER, DOUBLE], "max_tokens": 4, "temperature": 0}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "who?"}]},
    {"type": "function_call", "call_id": "a", **FUNCTION},
    {"type": "function_call_output", "call_id": "a", "output": "rain"},
]
RESPONSE = {"input": ITEMS, "instructions": "Be brief.", "max_output_tokens": 4, "top_p": 0.9}
BLOCKS = [
    {"role": "user", "content": PARTS},
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "a", "name": "double", "input": {"n": 1}}],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": PARTS}]},
]
MESSAGE = {"messages": BLOCKS, "system": PARTS, "max_tokens": 4, "stop_sequences": ["x"]}
TOOL = {"name": "double", "input_schema": DOUBLE["function"]["parameters"]}
OLLAMA = {"model": NAME, "options": SAMPLING | {"num_predict": 2}}
CALL = {"function": {"name": "double", "arguments": {"n": 1}}}
SHOWN = [SAID[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]

APIS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "openai": [
        *[("v1/chat/completions", CHAT | STREAMED), ("v1/chat/completions", CHAT)] * 3,
        *[("v1/completions", TEXT), ("v1/completions", TEXT | {"prompt": [5, 6, 7]})] * 3,
        ("v1/chat/completions", CHAT | {"response_format": FORM}),
        ("v1/completions", TEXT | {"grammar": 'root ::= "a" | "b" root'}),
    ],
    "tools": [
        ("v1/chat/completions", TOOLS),
        ("v1/chat/completions", TOOLS | STREAMED | {"tool_choice": "required"}),
        ("v1/chat/completions", TOOLS | {"tool_choice": NAMED, "parallel_tool_calls": False}),
    ],
    "responses": [
        ("v1/responses", RESPONSE | {"tools": [{"type": "function", **DOUBLE["function"]}]}),
        ("v1/responses", RESPONSE | {"text": {"format": FORM | {"schema": SCHEMA}}}),
        ("v1/responses", RESPONSE | {"stream": True, "previous_response_id": None}),
    ],
    "messages": [
        ("v1/messages", MESSAGE | {"tools": [TOOL], "tool_choice": {"type": "any"}}),
        ("v1/messages", MESSAGE | {"stream": True, "top_k": 5}),
        ("v1/messages/count_tokens", {"messages": BLOCKS, "tools": [TOOL]}),
    ],
    "ollama": [
        ("api/chat", OLLAMA | {"messages": SHOWN, "tools": [DOUBLE]}),
        ("api/chat", OLLAMA | {"messages": SAID[:1], "stream": False, "format": SCHEMA}),
        ("api/generate", OLLAMA | {"prompt": "who?", "system": "Be brief.", "logprobs": True}),
        ("api/show", {"model": NAME}),
    ],
    "llama_server": [
        ("completion", {"prompt": "once", "n_predict": 2, "n_probs": 2} | SAMPLING),
        ("completion", {"prompt": [5, 6, 7], "n_predict": 2, "json_schema": SCHEMA}),
        ("infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 2}),
        ("tokenize", {"content": "once", "with_pieces": True}),
        ("detokenize", {"tokens": [5, 6, 7]}),
    ],
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apis")
    template = TEMPLATES[QWEN].read_text()
    path = tiny(folder, boundary=1, chat_template=template, n_layer=2, n_embd=64, n_ff=64)
    with opened(path, n_ctx=2048) as model, app_client(app_of(model, NAME)) as client:
        yield client


@pytest.mark.parametrize("api", APIS)
def test_damaged_requests_cause_no_server_error(client, caplog, api):
    def attempt(rng: random.Random) -> None:
        path, body = rng.choice(APIS[api])
        content = json.dumps(mutated_json(rng, body)).encode()
        if rng.random() < 0.2:
            content = mutated_bytes(rng, content, 0, len(content))
        reply = client.post(f"/{path}", content=content)
        assert not caplog.records and reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error if isinstance(error, str) else error["message"]
            raise PopError("refused")
        assert '"server_error"' not in reply.text and '"api_error"' not in reply.text

    with caplog.at_level(logging.ERROR):
        campaign(attempt)
