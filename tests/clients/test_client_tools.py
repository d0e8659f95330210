"""Tool calls by OpenAI's and Anthropic's clients against `pop-local serve`."""

import json
from typing import Any

import openai
import pytest

from support.chat_tools import DOUBLE

ASKED: Any = [{"role": "user", "content": "How much is twice four? " * 20}]
OPENAI: dict[str, Any] = {"model": "tiny", "temperature": 0}
TOOL: Any = {"name": "double", "input_schema": DOUBLE["function"]["parameters"]}
FUNCTION: Any = {"type": "function", "strict": True, **DOUBLE["function"]}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat_client_calls_tool(client):
    forced = OPENAI | {"tools": [DOUBLE], "parallel_tool_calls": False, "max_tokens": 600}
    with client.chat.completions.stream(**forced, messages=ASKED, tool_choice="required") as stream:
        said = stream.get_final_completion().choices[0]
    [call] = said.message.tool_calls
    assert said.finish_reason == "tool_calls" and json.loads(call.function.arguments)["n"] in range(
        10
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "8"}
    turn = [*ASKED, said.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**forced | {"max_tokens": 4}, messages=turn)
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert answer.choices[0].message.content
    assert cached > answer.usage.prompt_tokens / 2


def test_openai_responses_client_calls_tool(client):
    forced = OPENAI | {"tools": [FUNCTION], "parallel_tool_calls": False}
    with client.responses.stream(
        **forced, input=ASKED, tool_choice="required", max_output_tokens=600
    ) as stream:
        first = stream.get_final_response()
    [call] = first.output
    assert call.type == "function_call" and json.loads(call.arguments)["n"] in range(10)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "8"}
    second = client.responses.create(
        **forced, input=[result], previous_response_id=first.id, max_output_tokens=4
    )
    assert second.output_text and second.usage.input_tokens_details.cached_tokens > 0


def test_anthropic_client_calls_tool(server):
    import anthropic  # here, since the import takes seconds

    request: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "extra_body": {"temperature": 0}}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=server.root, api_key="none", max_retries=0) as client:
        with client.messages.stream(
            **request, messages=ASKED, tool_choice=choice, max_tokens=600
        ) as stream:
            said = stream.get_final_message()
        [use] = said.content
        assert said.stop_reason == "tool_use" and use.type == "tool_use"
        assert isinstance(use.input, dict) and use.input["n"] in range(10)
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "8"}
        turn = [
            *ASKED,
            {"role": "assistant", "content": said.content},
            {"role": "user", "content": [result]},
        ]
        answer = client.messages.create(**request, messages=turn, max_tokens=4)
        assert answer.content[0].type == "text" and answer.usage.cache_read_input_tokens
        counted = client.messages.count_tokens(model="tiny", messages=turn, tools=[TOOL])
        n_read = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
        assert counted.input_tokens == n_read
        robot: Any = [{"role": "robot", "content": "a"}]
        with pytest.raises(anthropic.BadRequestError, match="role"):
            client.messages.create(**request, messages=robot, max_tokens=4)
