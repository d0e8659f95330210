"""Ollama's client (the package ollama 0.6.3) against `pop-local serve`."""

import asyncio
import base64

import ollama
import pytest

from support.converted import tiny
from support.serving import served
from support.synthetic import TEMPLATE

LONG = "the quick brown fox jumps over the lazy dog, " * 6
SAID = [{"role": "user", "content": LONG}]
EIGHT = {"temperature": 0, "num_predict": 8, "num_ctx": 512}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("ollama"), chat_template=TEMPLATE)
    with served(path, "--name", "tiny", "--ctx", 1024, "--refill", "off") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with ollama.Client(host=server.root) as client:
        yield client


def test_client_chats_with_and_without_streaming(client, server):
    whole = client.chat("tiny", SAID, options=EIGHT, keep_alive="5m", think=False)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 8)
    assert whole.total_duration > whole.prompt_eval_duration > 0
    assert whole.message.role == "assistant"
    *pieces, last = client.chat("tiny", SAID, options=EIGHT, stream=True)
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert last.prompt_eval_count == whole.prompt_eval_count

    async def ask() -> str:
        async with ollama.AsyncClient(host=server.root) as other:
            answer = await other.chat("tiny", SAID, options=EIGHT)
        return str(answer.message.content)

    assert asyncio.run(ask()) == whole.message.content


def test_client_generates_text(client):
    whole = client.generate("tiny", LONG, system="be brief", options=EIGHT)
    streamed = client.generate("tiny", LONG, system="be brief", options=EIGHT, stream=True)
    assert "".join(piece.response for piece in streamed) == whole.response
    schema = {"enum": [57]}
    assert client.generate("tiny", LONG, format=schema, options=EIGHT).response == "57"
    assert client.generate("tiny", LONG, raw=True, options=EIGHT).response
    assert client.generate("tiny").done_reason == "load"


def test_client_lists_and_describes_models(client):
    (model,) = client.list().models
    assert (model.model, model.details.family) == ("tiny:latest", "llama")
    assert int(model.size) > 0
    (running,) = client.ps().models
    assert running.context_length == 1024
    details = client.show(model.model)
    assert details.modelinfo["llama.context_length"] == 1024
    assert "completion" in details.capabilities
    assert details.modified_at == model.modified_at


def test_client_receives_log_probabilities(client):
    answer = client.chat("tiny", SAID, options=EIGHT, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == 8
    assert answer.logprobs[0].top_logprobs[0].logprob >= answer.logprobs[0].logprob


def test_errors_raise_response_error(client):
    image = base64.b64encode(b"no picture").decode()
    with pytest.raises(ollama.ResponseError, match="cannot read images") as caught:
        client.chat("tiny", [{"role": "user", "content": "a", "images": [image]}])
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="context is too small"):
        list(client.generate("tiny", "x" * 5000, stream=True))
    with pytest.raises(ollama.ResponseError, match="unknown path"):
        client.pull("tiny")


def test_client_computes_embeddings(client):
    one, two = client.embed("tiny", ["a", "b"]).embeddings
    assert len(one) == len(two) == 128 and one != two
    assert client.embeddings("tiny", "a").embedding == pytest.approx(one, abs=1e-5)


def test_unknown_model_name_is_answered(client):
    assert client.chat("llama3.2", SAID, options=EIGHT).model == "tiny"
