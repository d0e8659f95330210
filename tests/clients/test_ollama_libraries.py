"""Clients of Ollama's API: litellm (1.110.2), langchain-ollama (1.1.0)."""

import os

import pytest

from support.converted import tiny
from support.serving import served
from support.synthetic import TEMPLATE

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or litellm downloads prices
litellm = pytest.importorskip("litellm", reason="pip install 'pop-local[clients]'")
langchain_ollama = pytest.importorskip("langchain_ollama")

SAID = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("libraries"), chat_template=TEMPLATE)
    with served(path, "--ctx", 1024, "--refill", "off") as server:
        yield server.root


@pytest.mark.parametrize("provider", ["ollama_chat", "ollama"])
def test_litellm_completes_and_streams(root, provider):
    request = {"api_base": root, "messages": SAID, "max_tokens": 8, "temperature": 0}
    whole = litellm.completion(model=f"{provider}/any", **request)
    assert whole.usage.completion_tokens == 8
    streamed = litellm.completion(model=f"{provider}/any", **request, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(texts) == whole.choices[0].message.content != ""


def test_langchain_invokes_and_streams(root):
    request = {"model": "any", "base_url": root, "num_predict": 8, "temperature": 0}
    model = langchain_ollama.ChatOllama(**request)
    whole = model.invoke("the quick brown fox")
    assert whole.usage_metadata["output_tokens"] == 8
    assert whole.response_metadata["done_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream("the quick brown fox")) == whole.content
    assert langchain_ollama.OllamaLLM(**request).invoke("the quick brown fox")
