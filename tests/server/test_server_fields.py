"""Paths and fields that clients of llama-server and of newer APIs use."""

import json

import pytest

from pop_local.server.apis import ollama
from support.server_requests import LONG, N_CTX, NAME, chat, complete, events, text_of

SAID = {"messages": [{"role": "user", "content": LONG}], "temperature": 0, "max_tokens": 4}
MESSAGE = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def test_models_route_works_without_version(client):
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get(f"/models/{NAME}").json()["id"] == NAME


def test_counts_equal_usage(client):
    n_counted = client.post("/v1/chat/completions/input_tokens", json=SAID).json()["input_tokens"]
    assert n_counted == chat(client).json()["usage"]["prompt_tokens"]


def test_slots_describe_each_sequence(client):
    job = chat(client).json()["usage"]["pop"]["job"]
    [slot] = client.get("/slots").json()
    assert slot == {
        "id": 0, "model": NAME, "n_ctx": N_CTX, "is_processing": False, "speculative": False,
        "job": job, "n_behind": 0,
    }  # fmt: skip
    assert client.get("/slots", params={"model": "other"}).json() == []


def test_template_is_applied(client):
    prompt = client.post("/apply-template", json=SAID).json()["prompt"]
    assert prompt == f"user: {LONG}\nassistant:"


def test_final_message_is_continued(client):
    begun = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "the fox"}]
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    prompt = client.post("/apply-template", json=fields).json()["prompt"]
    assert prompt == f"user: {LONG}\nassistant:the fox"
    by_hand = complete(client, f"user: {LONG}\nassistant:the fox", max_tokens=4)
    assert text_of(chat(client, **(fields | {"max_tokens": 4}))) == text_of(by_hand)


def test_top_level_schema_is_enforced(client):
    assert text_of(chat(client, json_schema={"enum": [57]}, max_tokens=20)) == "57"


@pytest.mark.parametrize("form", [dict, list])
@pytest.mark.parametrize("ask", [chat, complete])
def test_logit_bias_changes_answer(client, ask, form):
    letter = client.post("/tokenize", json={"content": "q"}).json()["tokens"][-1]
    bias = {str(letter): 100} if form is dict else [[letter, 100]]
    assert set(text_of(ask(client, logit_bias=bias)).replace(" ", "")) == {"q"}


def test_logit_bias_forbids_tokens(client):
    fields = {"prompt": LONG, "n_predict": 8, "temperature": 0, "return_tokens": True}
    usual = client.post("/completion", json=fields).json()["tokens"]
    for never in ([[token, False] for token in usual], {str(token): -1000 for token in usual}):
        tokens = client.post("/completion", json=fields | {"logit_bias": never}).json()["tokens"]
        assert tokens and not set(tokens) & set(usual)


def test_logit_bias_accepts_text_and_respects_grammar(client):
    assert set(text_of(complete(client, logit_bias={"q": 100})).replace(" ", "")) == {"q"}
    grammar = 'root ::= "a" | "b"'
    for letter in "ab":
        bias = [[client.post("/tokenize", json={"content": "x" + letter}).json()["tokens"][-1], 99]]
        assert text_of(complete(client, grammar=grammar, logit_bias=bias)) == letter


@pytest.mark.parametrize("temperature", [0, 1])
def test_grammar_requiring_forbidden_tokens_is_an_error(client, temperature):
    never = [[token, False] for token in range(384)]
    fields = {"grammar": 'root ::= "a"', "logit_bias": never, "temperature": temperature}
    assert text_of(complete(client, **fields)) == "a"


def test_answers_contain_fingerprint_ids_and_timings(client):
    answer = chat(client).json()
    assert answer["id"].startswith("chatcmpl-") and answer["system_fingerprint"].startswith("b")
    assert answer["timings"]["predicted_n"] == answer["usage"]["completion_tokens"]
    streamed = events(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {event["system_fingerprint"] for event in streamed} == {answer["system_fingerprint"]}
    assert streamed[-1]["timings"].keys() == answer["timings"].keys()
    assert client.post("/v1/messages", json=MESSAGE).json()["id"].startswith("msg_")
    timings = chat(client, max_tokens=1).json()["timings"]
    assert (timings["predicted_n"], timings["predicted_per_second"]) == (1, 0.0)


def test_prompts_may_mix_text_and_tokens(client):
    tokens = client.post("/tokenize", json={"content": LONG, "add_special": True}).json()["tokens"]
    expected = text_of(complete(client))
    for prompt in ({"prompt_string": LONG}, {"content": [{"type": "text", "text": LONG}]}):
        assert text_of(complete(client, prompt)) == expected
    several = complete(client, [LONG, tokens, {"prompt_string": LONG}]).json()["choices"]
    assert [choice["text"] for choice in several] == [expected] * 3
    at = len(tokens) // 2
    rest = client.post("/detokenize", json={"tokens": tokens[at:]}).json()["content"]
    mixed = complete(client, [*tokens[:at], rest.strip()])
    assert mixed.json()["usage"]["prompt_tokens"] == pytest.approx(len(tokens), abs=2)


def test_embeddings_accept_empty_text_and_content(client):
    def vectors(path="/v1/embeddings", **body):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return [row["embedding"] for row in response.json()["data"]]

    [alone] = vectors(input="a b")
    assert vectors(content="a b") == vectors(path="/embeddings", content="a b") == [alone]
    parts = {"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
    assert vectors(input=["a b", parts]) == [alone, alone]
    assert len(vectors(input="")) == 1
    assert len(vectors(input=["", "a", ""])) == 3
    of_ollama = client.post("/api/embed", json={"input": ["", "a"]}).json()
    assert len(of_ollama["embeddings"]) == 2


def test_answers_contain_token_ids(client):
    fields = {"prompt": LONG, "n_predict": 4, "temperature": 0, "return_tokens": True}
    answer = client.post("/completion", json=fields).json()
    assert "completion_probabilities" not in answer
    assert len(answer["tokens"]) == 4
    assert client.post("/completion", json=fields | {"return_tokens": False}).json()["tokens"] == []
    probable = client.post("/completion", json=fields | {"n_probs": 2}).json()
    ids = [entry["id"] for entry in probable["completion_probabilities"]]
    assert ids == [entry["top_logprobs"][0]["id"] for entry in probable["completion_probabilities"]]


def test_has_new_line_belongs_to_each_answer(client):
    forms = {"prompt": "a", "n_predict": 4, "temperature": 1.9, "n_cmpl": 12, "seed": 1}
    answers = client.post("/completion", json=forms | {"grammar": r'root ::= "a" [\nb] "c"'}).json()
    flags = [answer["has_new_line"] for answer in answers]
    assert flags == ["\n" in answer["content"] for answer in answers]
    assert flags != sorted(flags)  # an answer without a new line follows one with a new line


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/chat/completions", SAID),
        ("/v1/completions", {"prompt": LONG}),
        ("/completion", {"prompt": LONG, "n_predict": 2}),
    ],
)
def test_stream_contains_progress_events(client, endpoint, body):
    def progress(**more):
        new = json.loads(json.dumps(body).replace("quick", f"slow {endpoint}"))
        text = client.post(endpoint, json=new | {"stream": True, **more}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return [figures["prompt_progress"] for figures in chunks if "prompt_progress" in figures]

    read = progress(return_progress=True, cache_prompt=False)
    assert read[0]["processed"] == read[0]["cache"]
    assert read[-1]["processed"] == read[-1]["total"] > 0
    assert [figures["processed"] for figures in read] == sorted(
        figures["processed"] for figures in read
    )
    assert progress() == []


def test_ollama_stream_reports_prefill(client, monkeypatch):
    monkeypatch.setattr(ollama, "_QUIET_S", 0.0)
    monkeypatch.setattr("pop_local.server.job_responses._PROGRESS_S", 0.0)
    body = {"messages": [{"role": "user", "content": LONG[::-1] * 2}]}
    lines = client.post("/api/chat", json=body | {"options": {"num_predict": 1}}).text.split("\n")
    first = json.loads(lines[0])
    assert (first["message"], first["done"]) == ({"role": "assistant", "content": ""}, False)
    assert "" not in lines[:-1]


def test_messages_may_contain_text_documents(client):
    def n_tokens(*content):
        body = {"messages": [{"role": "user", "content": [*content]}]}
        response = client.post("/v1/messages/count_tokens", json=body)
        assert response.status_code == 200, response.text
        return response.json()["input_tokens"]

    source = {"type": "text", "media_type": "text/plain", "data": "rain"}
    document = {"type": "document", "source": source, "title": "weather"}
    question = {"type": "text", "text": "when"}
    expected = n_tokens({"type": "text", "text": "weather\n\nrain"}, question)
    assert n_tokens(document, question) == expected
    pdf = {"type": "document", "source": {"type": "base64", "data": ""}}
    body = MESSAGE | {"messages": [{"role": "user", "content": [pdf]}]}
    assert client.post("/v1/messages", json=body).status_code == 400


def test_stored_responses_can_be_read_and_deleted(client):
    fields = {"input": LONG, "max_output_tokens": 2, "instructions": "Be brief."}
    response = client.post("/v1/responses", json=fields).json()
    path = f"/v1/responses/{response['id']}"
    assert response["id"].startswith("resp_") and response["output"][0]["id"].startswith("msg_")
    assert client.get(path).json() == response
    [item] = client.get(f"{path}/input_items").json()["data"]
    assert (item["type"], item["content"][0]["text"]) == ("message", LONG)
    deleted = client.delete(path).json()
    assert deleted == {"id": response["id"], "object": "response", "deleted": True}
    for gone in (client.get(path), client.get(f"{path}/input_items"), client.delete(path)):
        assert gone.status_code == 404
        assert "is not stored" in gone.json()["error"]["message"]
    assert client.post(
        "/v1/responses", json=fields | {"previous_response_id": response["id"]}
    ).status_code == 400  # fmt: skip
