"""Embeddings by the APIs of OpenAI and Ollama."""

import base64

import numpy as np
import pytest

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.embedding import embedding
from support.calls import first_of, opened
from support.server_requests import LONG, N_CTX, NAME, chat
from support.serving import app_client, app_of


def test_embeddings_equal_the_models(client, full):
    texts = ["one", "two words", LONG]
    fields = {"model": NAME, "input": texts}
    answer = client.post("/v1/embeddings", json=fields).json()
    vectors = [np.array(row["embedding"]) for row in answer["data"]]
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    tokens = [
        full.engine.context.vocabulary.tokenize(text, add_bos=True, special=True) for text in texts
    ]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    for vector, ids in zip(vectors, tokens, strict=True):
        assert np.allclose(vector, embedding(first_of(full).cache, ids))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    packed = client.post("/v1/embeddings", json=fields | {"encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][2]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), vectors[2].astype("f4"))
    by_tokens = client.post("/v1/embeddings", json={"input": tokens[1]}).json()
    assert np.allclose(by_tokens["data"][0]["embedding"], vectors[1])
    of_ollama = client.post("/api/embed", json=fields).json()
    assert np.allclose(of_ollama["embeddings"], vectors)
    older = client.post("/api/embeddings", json={"model": NAME, "prompt": texts[1]}).json()
    assert np.allclose(older["embedding"], vectors[1])


def test_embeddings_keep_prompt_cache(path):
    with opened(path, n_ctx=N_CTX) as model:
        first_of(model).states.prompts = PromptCache(1 << 24)
        with app_client(app_of(model, NAME)) as client:
            chat(client)
            client.post("/v1/embeddings", json={"input": "another text"})
            usage = chat(client).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2
