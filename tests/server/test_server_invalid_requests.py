"""Invalid requests of every API but OpenAI's completions: the error names the reason."""

import json

import pytest

from support.chat_tools import DOUBLE, WEATHER, function
from support.server_requests import LONG, body_for, error_of

NAN = float("nan")
TOOLS = [WEATHER, DOUBLE]
RESPONSES_TOOL = {"type": "function", **DOUBLE["function"]}
ANTHROPIC_TOOL = {"name": "double", "input_schema": DOUBLE["function"]["parameters"]}
ENUM = {"type": "json_object", "schema": {"enum": []}}


def user(**fields):
    return {"messages": [{"role": "user", **fields}]}


def allowed(name):
    tools = {"mode": "auto", "tools": [{"function": {"name": name}}]}
    return {"type": "allowed_tools", "allowed_tools": tools}


INVALID = {
    "/v1/messages": [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        (user(content=[{"type": "document"}]), "messages.0"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice requires tools"),
        (
            {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "x"}},
            "not in tools",
        ),
        ({"temperature": -1}, "temperature"),
    ],
    "/v1/responses": [
        ({"input": [{"type": "web_search_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0"),
        ({"input": []}, "messages"),
        ({"previous_response_id": "resp_0"}, "response 'resp_0' is not stored"),
        ({"background": True}, "background is not supported"),
        ({"tool_choice": "required"}, "tool_choice requires tools"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [RESPONSES_TOOL | {"parameters": {"default": NAN}}]}, "NaN"),
        ({"temperature": -1}, "temperature"),
    ],
    "/completion": [
        ({"samplers": ["top_k"]}, "samplers is not supported"),
        ({"prompt": {"prompt_string": 5}}, "send one text or a list"),
        ({"prompt": None}, "prompt"),
    ],
    "/tokenize": [
        ({"content": None}, "content"),
        ({"content": [1, "a"]}, "content"),
        ({"with_pieces": True}, "with_pieces is not supported"),
    ],
    "/detokenize": [
        ({"tokens": [384]}, "must be between 0 and 383"),
        ({"tokens": ["a"]}, "tokens.0"),
    ],
    "/infill": [
        ({}, "no fill-in-the-middle"),
        ({"input_extra": [{"text": 5}]}, "input_extra.0.text"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra.0.text"),
    ],
    "/api/chat": [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": [{"role": "function", "content": "x"}]}, "role"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages.0.tool_calls.0.function.name: Field required",
        ),
        ({"options": {"temperature": -1}}, "temperature"),
        ({"options": {"num_predict": "many"}}, "n_predict"),
        ({"options": {"mirostat": 2}}, "mirostat is not supported"),
        ({"options": []}, "options"),
        ({"format": "xml"}, 'format must be "json"'),
        ({"format": {"type": "string", "pattern": "(?=a)"}}, "pattern"),
        (user(images=["AAAA"]), "cannot read images"),
    ],
    "/api/generate": [
        ({"template": "{{ .Prompt }}"}, "template is not supported"),
        ({"context": [1, 2]}, "context is not supported"),
        ({"suffix": "b"}, "no fill-in-the-middle"),
        ({"raw": True, "images": ["AAAA"]}, "combined with raw"),
    ],
    "/v1/embeddings": [
        ({"input": None, "content": None}, "input"),
        ({"dimensions": 3}, "dimensions must be 128"),
        ({"input": [2**31]}, "token IDs must be between 0 and"),
        ({"input": ["a"] * 2049}, "up to 2048"),
        ({"input": []}, "the prompt is empty"),
        ({"input": {"content": [{"type": "image_url"}]}}, "input: send one text"),
        ({"input": LONG * 20}, "the context is too small"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
    "/v1/chat/completions": [
        ({"tool_choice": "required"}, "tool_choice requires tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice requires tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
        ),
        ({"tools": [WEATHER, WEATHER]}, "two tools have the same name"),
        ({"tools": [WEATHER] * 257}, "tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "'x', which is not in tools",
        ),
        ({"tools": TOOLS, "tool_choice": allowed("x")}, "'x', which is not in tools"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
        ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "send tools or grammar, not both"),
        ({"tools": TOOLS, "response_format": ENUM}, "schema"),
        ({"tools": [function("a", b={"type": "any"})]}, "a tool's schema is not valid"),
        ({"tools": [function("a", b={"$ref": "#/nowhere"})]}, "not valid"),
    ],
}


@pytest.mark.parametrize(
    ("route", "fields", "reason"),
    [(route, *row) for route, rows in INVALID.items() for row in rows],
)
def test_error_contains_the_reason(client, route, fields, reason):
    content = json.dumps(body_for(route) | fields)  # writes NaN, unlike httpx
    response = client.post(route, content=content)
    assert response.status_code == 400
    assert reason in error_of(response)
