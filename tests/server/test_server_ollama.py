"""Ollama's API: the answers equal those of OpenAI's API."""

import json

import pytest

from support.server_requests import LONG, N_CTX, NAME, chat, complete, text_of

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
EIGHT = {"temperature": 0, "num_predict": 8}
FIGURES = {
    *("total_duration", "load_duration", "prompt_eval_duration", "prompt_eval_count"),
    *("eval_duration", "eval_count", "pop"),
}


def ask(client, path="chat", options=EIGHT, **body):
    fixed = {"model": NAME, "options": options, "stream": False}
    prompt_fields = {"messages": [{"role": "user", "content": LONG}]} if path == "chat" else {}
    return client.post(f"/api/{path}", json=fixed | prompt_fields | body)


def lines(response) -> list:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def said(response) -> str:
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["message"]["content"] if "message" in answer else answer["response"]


def test_root_and_version_respond(client):
    assert client.get("/").text == "Ollama is running"
    assert client.head("/").status_code == 200
    assert client.get("/api/version").json()["version"].count(".") == 2


def test_models_are_listed_and_described(client, path):
    (model,) = client.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == f"{NAME}:latest"
    assert model["size"] == path.stat().st_size
    assert len(model["digest"]) == 64
    assert model["details"]["family"] == "llama"
    (running,) = client.get("/api/ps").json()["models"]
    assert running["digest"] == model["digest"]
    assert running["context_length"] == N_CTX
    for name in (NAME, f"{NAME}:latest", "llama3.2"):
        response = client.post("/api/show", json={"model": name})
        assert ("x-model" in response.headers) is (name == "llama3.2")
    description = response.json()
    assert description["capabilities"] == ["completion", "tools"]
    assert description["model_info"]["llama.context_length"] == N_CTX
    assert description["model_info"]["llama.block_count"] == 8
    assert f"num_ctx {N_CTX}" in description["parameters"]
    assert "assistant:" in description["template"]


def test_chat_equals_openai_chat(client):
    expected = chat(client).json()
    response = ask(client)
    assert said(response) == text_of(chat(client))
    answer = response.json()
    assert answer.keys() >= FIGURES | {"model", "created_at", "done"}
    assert (answer["done"], answer["done_reason"]) == (True, "length")
    assert answer["message"]["role"] == "assistant"
    assert answer["prompt_eval_count"] == expected["usage"]["prompt_tokens"]
    assert answer["eval_count"] == 8
    assert answer["pop"].keys() == expected["usage"]["pop"].keys()
    assert answer["eval_duration"] == round(answer["pop"]["decode_s"] * 1e9)
    assert answer["prompt_eval_duration"] <= answer["total_duration"]


@pytest.mark.parametrize("endpoint", ["chat", "generate"])
def test_stream_is_default_and_equals_complete_answer(client, endpoint):
    body = {"prompt": LONG} if endpoint == "generate" else {}
    *pieces, last = lines(ask(client, endpoint, stream=None, **body))
    texts = [piece.get("response") or piece["message"]["content"] for piece in pieces]
    assert "".join(texts) == said(ask(client, endpoint, **body))
    assert not any(piece["done"] or FIGURES & piece.keys() for piece in pieces)
    assert last["done"] and last.keys() >= FIGURES
    assert last["eval_count"] == 8


def test_generate_applies_the_template(client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": LONG}]
    expected = said(ask(client, messages=messages))
    assert said(ask(client, "generate", prompt=LONG, system="be brief")) == expected
    raw = ask(client, "generate", prompt=LONG, raw=True)
    assert said(raw) == text_of(complete(client)) != expected


def test_accepts_options_by_name(client):
    whole = said(ask(client))
    stopped = ask(client, options=EIGHT | {"stop": [whole[3:5]]}).json()
    assert stopped["message"]["content"] == whole[: whole.index(whole[3:5])]
    assert stopped["done_reason"] == "stop"
    ignored = {
        "num_ctx": 4096,
        "num_gpu": 1,
        "num_thread": 4,
        "tfs_z": 1.0,
        "penalize_newline": True,
    }
    assert said(ask(client, options=EIGHT | ignored, keep_alive="5m", think=False)) == whole
    warm = {"temperature": 1.5, "num_predict": 20, "seed": 5}
    assert said(ask(client, options=warm)) == said(ask(client, options=warm))
    assert said(ask(client, options=warm)) != said(ask(client, options=warm | {"seed": 6}))
    unlimited = ask(client, format={"enum": ["a"]}, options={"num_predict": -1}).json()
    assert unlimited["done_reason"] == "stop"


def test_format_is_enforced(client):
    fixed = {"format": {"enum": [57]}, "options": {}}
    assert said(ask(client, **fixed)) == "57"
    assert said(ask(client, "generate", prompt="a", **fixed)) == "57"
    anything = ask(client, format="json", options={"temperature": 0, "num_predict": 3})
    assert said(anything).startswith("{")
    assert said(ask(client, format="")) == said(ask(client))


def test_answers_contain_log_probabilities(client):
    logprobs = ask(client, logprobs=True, top_logprobs=2).json()["logprobs"]
    expected = chat(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert [token["bytes"] for token in logprobs] == [
        token["bytes"] for token in expected["content"]
    ]
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs)
    assert len(ask(client, "generate", prompt="a", logprobs=True).json()["logprobs"]) == 8


def test_empty_request_reports_load(client):
    for endpoint in ("chat", "generate"):
        answer = ask(client, endpoint, messages=[]).json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")
        assert ask(client, endpoint, messages=[], keep_alive=0).status_code == 200


def test_access_errors_have_ollama_shape(client):
    foreign = client.get("/api/tags", headers={"Host": "evil.example"})
    assert (foreign.status_code, foreign.json().keys()) == (403, {"error"})


def test_stream_error_is_sent_as_line(client, monkeypatch):
    def broken(*_):
        raise ValueError("on purpose")

    monkeypatch.setattr("pop_local.server.worker.Worker._answer", broken)
    (line,) = lines(ask(client, stream=True))
    assert "on purpose" in line["error"]
