"""Objects and tool calls by instructor (1.17) and LlamaIndex (llama-index-llms-openai-like 0.8).

LlamaIndex needs openai 2, but the latest llm needs openai 3, so the extra `clients` omits
LlamaIndex.
"""

import os
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

ASKED: Any = [{"role": "user", "content": "How much is twice four?"}]


class Doubled(BaseModel):
    """A number to double."""

    n: int = Field(ge=0, le=9)


def test_instructor_returns_object(server):
    instructor = pytest.importorskip("instructor", reason="pip install '.[clients]'")
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
        result = client.chat.completions.create(
            model="tiny",
            messages=ASKED,
            response_model=Doubled,
            temperature=0,
            max_tokens=600,
            max_retries=1,
        )
    assert result.n in range(10)


def test_llama_index_chats_and_calls_tool(server):
    os.environ["LLAMA_INDEX_CACHE_DIR"] = os.devnull  # no model or data is downloaded
    package = "llama-index-llms-openai-like"
    like = pytest.importorskip("llama_index.llms.openai_like", reason=f"pip install {package}")
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.tools import FunctionTool

    model = like.OpenAILike(
        model="tiny",
        api_base=server.api,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        temperature=0,
        max_tokens=8,
    )
    said = [ChatMessage(role="user", content=ASKED[0]["content"])]
    whole = model.chat(said).message.content
    assert "".join(piece.delta or "" for piece in model.stream_chat(said)) == whole != ""

    def double(n: int) -> int:
        """Return twice `n`."""
        return 2 * n

    model.max_tokens = 600
    tool = FunctionTool.from_defaults(double)
    answer = model.chat_with_tools([tool], chat_history=said, tool_required=True)
    [call] = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "double" and isinstance(call.tool_kwargs["n"], int)
