"""Tool calls by libraries that use OpenAI's API.

They are langchain-openai 1.7.4, litellm 1.110.2, pydantic-ai 2.68.0 and llm 0.36.
"""

import json
import os
from typing import Any

import pytest
from pydantic import BaseModel, Field

from support.chat_tools import DOUBLE

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or litellm downloads prices
langchain_openai = pytest.importorskip("langchain_openai", reason="pip install '.[clients]'")
litellm = pytest.importorskip("litellm", reason="pip install '.[clients]'")
llm = pytest.importorskip("llm", reason="pip install '.[clients]'")
pydantic_ai = pytest.importorskip("pydantic_ai", reason="pip install '.[clients]'")

ASKED = "How much is twice four?"


def test_langchain_binds_tools(server):
    chat = langchain_openai.ChatOpenAI(
        base_url=server.api, api_key="none", model="tiny", temperature=0, max_tokens=600
    )
    bound = chat.bind_tools([DOUBLE], tool_choice="required", parallel_tool_calls=False)
    [call] = bound.invoke(ASKED).tool_calls
    assert call["name"] == "double" and call["args"]["n"] in range(10)
    said = None
    for chunk in bound.stream(ASKED):
        said = chunk if said is None else said + chunk
    assert said is not None and said.tool_calls[0]["args"] == call["args"]


def test_litellm_calls_tool(server):
    answer = litellm.completion(
        model="openai/tiny",
        api_base=server.api,
        api_key="none",
        messages=[{"role": "user", "content": ASKED}],
        tools=[DOUBLE],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=600,
    )
    [call] = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["n"] in range(10)


class Doubled(BaseModel):
    n: int = Field(ge=0, le=9)


def test_pydantic_ai_gets_an_object(server):
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=server.api, api_key="none")
    settings: Any = {"temperature": 0, "max_tokens": 600, "parallel_tool_calls": False}
    agent = pydantic_ai.Agent(
        OpenAIChatModel("tiny", provider=provider), output_type=Doubled, model_settings=settings
    )
    assert agent.run_sync(ASKED).output.n in range(10)


def test_llm_sends_tools(server):
    from llm.default_plugins.openai_models import Chat

    def double(n: int) -> int:
        """Return twice `n`."""
        return 2 * n

    model = Chat("tiny", api_base=server.api, supports_tools=True)
    model.key = "none"
    answer = model.prompt(ASKED, tools=[double], stream=False, max_tokens=4, temperature=0)
    assert answer.text()
