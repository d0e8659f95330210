"""llama-server's API."""

import json

from support.filling import FIM, by_hand
from support.server_requests import LONG, N_CTX, NAME, complete, text_of

GREEDY = {"temperature": 0, "n_predict": 8}


def ask(client, path="completion", **body):
    response = client.post(f"/{path}", json=GREEDY | body)
    assert response.status_code == 200, response.text
    return response.json()


def test_health_and_props_describe_the_server(client):
    assert client.get("/v1/health").json() == {"status": "ok"}
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == N_CTX
    assert props["default_generation_settings"]["params"]["top_k"] == 40
    assert (props["total_slots"], props["model_alias"]) == (1, NAME)
    assert "/" not in props["model_path"]
    assert "assistant:" in props["chat_template"]
    assert props["modalities"] == {"vision": False, "audio": False}


def test_detokenize_reverses_tokenize(client, full):
    text = "a €uro </s>"
    tokens = ask(client, "tokenize", content=text)["tokens"]
    assert tokens == full.engine.context.vocabulary.tokenize(text, special=True)
    assert ask(client, "tokenize", content=text, parse_special=False)[
        "tokens"
    ] == full.engine.context.vocabulary.tokenize(text)
    begun = ask(client, "tokenize", content=text, add_special=True)["tokens"]
    assert begun == [*full.engine.context.vocabulary.bos, *tokens]
    assert ask(client, "detokenize", tokens=tokens)["content"].strip() == text


def test_completion_equals_openai_completion(client):
    expected = complete(client).json()
    answer = ask(client, prompt=LONG)
    assert answer["content"] == expected["choices"][0]["text"]
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "limit", "")
    assert answer["tokens_evaluated"] == expected["usage"]["prompt_tokens"]
    assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == 8
    assert (
        answer["timings"]["cache_n"] + answer["timings"]["prompt_n"] == answer["tokens_evaluated"]
    )
    settings = answer["generation_settings"]
    assert (settings["n_ctx"], settings["n_predict"], settings["temperature"]) == (N_CTX, 8, 0.0)
    assert answer["pop"].keys() == expected["usage"]["pop"].keys()


def test_matched_stop_string_is_reported(client):
    whole = ask(client, prompt=LONG)["content"]
    answer = ask(client, prompt=LONG, stop=["never said", whole[3:5]])
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", whole[3:5])
    ended = ask(client, prompt=LONG, grammar='root ::= "a"')
    assert (ended["content"], ended["stop_type"], ended["stopping_word"]) == ("a", "eos", "")


def test_stream_ends_with_counters(client):
    response = client.post("/completion", json=GREEDY | {"prompt": LONG, "stream": True})
    events = response.text.strip().split("\n\n")
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(piece["content"] for piece in pieces) == ask(client, prompt=LONG)["content"]
    assert [piece["stop"] for piece in pieces] == [False] * len(pieces)
    assert (last["stop"], last["content"], last["tokens_predicted"]) == (True, "", 8)


def test_accepts_llama_cpp_field_names(client):
    answer = ask(client, prompt="a", json_schema={"enum": [57]}, n_predict=-1)
    assert (answer["content"], answer["stop_type"]) == ("57", "eos")
    several = ask(client, prompt=["a", LONG], n_cmpl=2)
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert several[2]["content"] == text_of(complete(client))
    (first, *_) = ask(client, prompt="a", n_probs=3)["completion_probabilities"]
    assert len(first["top_logprobs"]) == 3
    assert ask(client, prompt="a", n_predict=0)["tokens_predicted"] == 1
    endless = ask(client, prompt="a", grammar='root ::= "b"', n_predict=None)
    assert (endless["content"], endless["generation_settings"]["n_predict"]) == ("b", -1)


def test_answers_infill_requests_of_editors(filler):
    model, client = filler
    hints = {"samplers": ["top_k", "infill"], "n_indent": 4, "t_max_predict_ms": 500}
    fields = {"input_prefix": "def f(", "input_suffix": "):", "prompt": "a, "}
    result = ask(client, "infill", **fields, **hints)
    expected = complete(client, by_hand(model, "def f(", "):", "a, "))
    assert result["content"] == text_of(expected)
    extra = [{"filename": "a.py", "text": "x = 1"}]
    longer = ask(client, "infill", **fields, input_extra=extra)
    assert longer["tokens_evaluated"] > result["tokens_evaluated"]
    assert (
        FIM[0]
        not in ask(client, "detokenize", tokens=model.engine.context.vocabulary.tokenize("x = 1"))[
            "content"
        ]
    )
    description = client.post("/api/show", json={}).json()
    assert "insert" in description["capabilities"]
    body = {"prompt": "def f(a, ", "suffix": "):", "options": {"temperature": 0, "num_predict": 8}}
    inserted = client.post("/api/generate", json=body | {"stream": False}).json()
    assert inserted["response"] == text_of(complete(client, "def f(a, ", suffix="):"))
