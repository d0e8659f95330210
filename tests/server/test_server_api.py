"""OpenAI's chat and text completions, on a tiny random model."""

import json
import re

import pytest

from pop_local.engine.turn_options import TurnOptions
from pop_local.server import job_responses
from pop_local.server.request_bodies import ChatBody
from pop_local.server.task_factory import TaskFactory
from support.calls import log_softmax, opened, read
from support.server_requests import LONG, N_CTX, NAME, chat, complete, events, text_of
from support.serving import app_client, app_of, metric_values
from support.synthetic import TEMPLATE, make_gguf

# --- endpoints and answers


def test_health_models_and_metrics_respond(client):
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == NAME
    about = {"n_ctx": N_CTX, "boundary": 4, "images": False, "exact": 0, "loaded": True}
    assert model["pop"] == about
    assert client.get(f"/v1/models/{NAME}").json() == model


def test_usage_and_metrics_report_counters(client):
    before = metric_values(client)
    usage = complete(client, "unlike others: " + LONG).json()["usage"]
    after = metric_values(client)
    n_cached, pop = usage["prompt_tokens_details"]["cached_tokens"], usage["pop"]
    assert pop["n_pruned"] > 100
    assert n_cached + pop["n_pruned"] + pop["n_full"] == usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < pop["prefill_s"] <= pop["ttft_s"]
    assert pop["reason"] is None
    ok = 'pop_requests_total{path="/v1/completions",status="200"}'
    expected = {
        'pop_prompt_tokens_total{kind="pruned"}': pop["n_pruned"],
        'pop_prompt_tokens_total{kind="full"}': pop["n_full"],
        'pop_prompt_tokens_total{kind="cached"}': n_cached,
        "pop_decoded_tokens_total": usage["completion_tokens"],
        "pop_ttft_seconds_count": 1,
        ok: 1,
    }
    assert {name: after[name] - before.get(name, 0) for name in expected} == expected


def test_next_request_reuses_cached_prefix(client):
    first = complete(client, LONG + "One.").json()["usage"]
    second = complete(client, LONG + "One. And more of it.").json()["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 17


def test_edited_prompt_reports_stale_tokens(client):
    complete(client, "Monday. " + 2 * LONG)
    before = metric_values(client)
    usage = complete(client, "Tuesday morning. " + 2 * LONG).json()["usage"]
    after = metric_values(client)
    n_cached, pop = usage["prompt_tokens_details"]["cached_tokens"], usage["pop"]
    assert 256 < pop["n_stale"] <= n_cached
    assert n_cached + pop["n_pruned"] + pop["n_full"] == usage["prompt_tokens"]
    assert after["pop_stale_tokens_total"] - before["pop_stale_tokens_total"] == pop["n_stale"]
    fresh = complete(client, "Monday. " + 2 * LONG, cache_prompt=False).json()["usage"]
    assert fresh["pop"]["n_stale"] == 0


@pytest.mark.parametrize("ask", [chat, complete])
def test_stream_equals_complete_answer(client, ask):
    whole = text_of(ask(client))
    streamed = events(ask(client, stream=True, stream_options={"include_usage": True}))
    *pieces, figures = streamed
    if ask is chat:
        assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
        text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
    else:
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
    assert text == whole
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-2:] == [None, "length"]
    assert figures["choices"] == []
    assert figures["usage"]["completion_tokens"] == 8
    assert all(piece["usage"] is None for piece in pieces)
    assert len({piece["id"] for piece in streamed}) == 1
    assert not any("usage" in piece for piece in events(ask(client, stream=True)))


def test_stream_sends_progress_comments(client, monkeypatch):
    monkeypatch.setattr(job_responses, "_PROGRESS_S", 0.0)
    response = complete(client, "something new. " + LONG[::-1], stream=True, max_tokens=2)
    assert re.match(r": (queued 1|read \d+ of \d+)\n\n", response.text)
    assert len(events(response)) >= 2


def test_answer_ends_at_stop_string_or_token_limit(client):
    whole = complete(client).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    part = whole["text"][3:5]
    for stop in (part, ["never said", part]):
        cut = complete(client, stop=stop).json()["choices"][0]
        assert cut["finish_reason"] == "stop"
        assert cut["text"] == whole["text"][: whole["text"].index(part)]
    assert complete(client, max_tokens=None).json()["usage"]["completion_tokens"] <= 16


def test_seed_makes_sampling_repeatable(client):
    warm = {"temperature": 1.5, "max_tokens": 20}
    assert text_of(chat(client, seed=5, **warm)) == text_of(chat(client, seed=5, **warm))
    assert text_of(chat(client, seed=5, **warm)) != text_of(chat(client, seed=6, **warm))
    largest = 2**32 - 1  # llama.cpp's value for a random seed
    assert text_of(chat(client, seed=largest, **warm)) == text_of(chat(client, seed=0, **warm))


def test_body_overrides_recommended_options(full, monkeypatch):
    # The engine is frozen; this is the value that its cached property returns.
    monkeypatch.setitem(full.engine.__dict__, "recommended", {"temperature": 0.6, "top_k": 64})
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.3}
    options = TaskFactory(full).chat(ChatBody.model_validate(body))[0].options
    assert (options.temperature, options.top_k) == (0.3, 64)
    assert options.top_p == TurnOptions().top_p


def test_minus_one_and_empty_stop_mean_unlimited(full):
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": -1, "top_k": -1, "stop": ""}
    options = TaskFactory(full).chat(ChatBody.model_validate(body))[0].options
    assert (options.max_tokens, options.top_k, options.stops) == (2**31 - 1, 0, ())


def test_message_content_may_be_parts(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert text_of(chat(client, content=parts)) == text_of(chat(client, content="one\ntwo"))


def test_schema_and_grammar_are_enforced(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = json.loads(text_of(chat(client, response_format=response_format, max_tokens=50)))
    assert answer["a"] in (True, False)
    of_llama_cpp = {"type": "json_object", "schema": schema}
    answer = json.loads(text_of(chat(client, response_format=of_llama_cpp, max_tokens=50)))
    assert answer["a"] in (True, False)
    assert text_of(complete(client, grammar='root ::= "yes" | "no"')) in ("yes", "no")


@pytest.mark.parametrize("n", [1, 2])
def test_partial_character_at_limit_is_dropped_but_counted(client, n):
    form = {"grammar": 'root ::= "€€"', "logprobs": 0}
    choice = complete(client, max_tokens=n, **form).json()["choices"][0]
    assert (choice["text"], len(choice["logprobs"]["tokens"])) == ("", n)
    pieces = events(complete(client, max_tokens=n, stream=True, **form))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == ""


def test_usage_lists_ignored_schema_keywords(client):
    schema = {"type": "array", "items": {"const": 1}, "maxItems": 2}
    for more, ignored in (({}, []), ({"uniqueItems": True}, ["uniqueItems"])):
        form = {"type": "json_object", "schema": schema | more}
        answer = chat(client, response_format=form, max_tokens=50).json()
        assert answer["usage"]["pop"]["ignored"] == ignored
        assert set(json.loads(answer["choices"][0]["message"]["content"])) <= {1}


# --- reading in full


def test_pop_false_gives_full_logits(client, full):
    tokens = full.engine.context.vocabulary.tokenize(LONG, add_bos=True, special=True)
    expected = log_softmax(read(full, tokens)).max()
    whole = complete(client, max_tokens=1, logprobs=1, pop=False)
    pruned = complete(
        client, max_tokens=1, logprobs=1, pop=True
    )  # the change of mode cleared the cache
    pop = whole.json()["usage"]["pop"]
    assert (pop["n_pruned"], pop["n_full"]) == (0, len(tokens))
    assert pop["reason"] == "the request disables pruning"
    assert pruned.json()["usage"]["pop"]["n_pruned"] > 100

    def first(answer) -> float:
        return answer.json()["choices"][0]["logprobs"]["token_logprobs"][0]

    assert first(whole) == pytest.approx(expected, abs=1e-4)
    assert abs(first(pruned) - expected) > 1e-2


@pytest.mark.parametrize(
    ("prompt", "pop", "reading"),
    [
        ("Anew: " + LONG, True, "pruned"),
        ("abc", True, "short"),
        (LONG, False, "full"),
        ("abc", False, "full"),
    ],
)
def test_usage_and_log_report_reading(client, caplog, prompt, pop, reading):
    caplog.set_level("INFO", "pop_local.server")
    usage = complete(client, prompt, pop=pop, max_tokens=1).json()["usage"]
    assert usage["pop"]["reading"] == reading
    assert (usage["pop"]["n_pruned"] > 0) is (reading == "pruned")
    notes = {
        "pruned": r"\d+ with fast reading, \d+ in full\)",
        "short": r"\d+ in full, too short for fast reading\)",
        "full": r"\([^)]*?\d+ in full\)",
    }
    assert re.search(notes[reading], caplog.messages[-1])


def test_chat_returns_logprobs(client):
    fields = {"logprobs": True, "top_logprobs": 2}
    (choice,) = chat(client, **fields).json()["choices"]
    content = choice["logprobs"]["content"]
    assert (
        b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace")
        == choice["message"]["content"]
    )
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in content)
    pieces = events(chat(client, stream=True, **fields))
    streamed = [piece["choices"][0]["logprobs"] for piece in pieces]
    tokens = [token for entry in streamed if entry for token in entry["content"]]
    assert [token["bytes"] for token in tokens] == [token["bytes"] for token in content]


def test_default_values_of_unsupported_fields_are_accepted(client):
    usual = {
        "grammar": "",
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": None},
        "repetition_penalty": 1.0,
        "typical_p": 1.0,
        "mirostat": 0,
        "n": 1,
        "add_generation_prompt": True,
        "add_special_tokens": False,
        "prompt_logprobs": None,
        "reasoning_effort": "low",
        "repeat_last_n": 64,
        "top_n_sigma": -1.0,
        "t_max_predict_ms": 0,
    }
    assert text_of(chat(client, **usual)) == text_of(chat(client))


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("limits", [{"n_predict": 3}, {"max_completion_tokens": 3}])
def test_max_completion_tokens_overrides_max_tokens(client, ask, limits):
    assert ask(client, max_tokens=9, **limits).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_end_token_of_completion_has_logprob(client, stream):
    """Evaluation harnesses expect one log probability per token of the usage."""
    fields = {"grammar": 'root ::= "a"', "max_tokens": 9, "logprobs": 1}
    if not stream:
        whole = complete(client, **fields).json()
        assert whole["usage"]["completion_tokens"] == 2
        assert len(whole["choices"][0]["logprobs"]["token_logprobs"]) == 2
        assert whole["choices"][0]["text"] == "a"
        return
    pieces = events(complete(client, stream=True, **fields))
    entries = [piece["choices"][0]["logprobs"] for piece in pieces]
    assert sum(len(entry["tokens"]) for entry in entries if entry) == 2


def test_last_token_has_logprob_for_any_text(tmp_path):
    control = [f"<|{n}|>" for n in range(200)]
    path = make_gguf(tmp_path / "control.gguf", "llama", n_vocab=512, control=control)
    fields = {"max_tokens": 1, "logprobs": 1, "temperature": 10.0}
    with app_client(app_of(opened(path), NAME)) as client:
        choices = [complete(client, seed=n, **fields).json()["choices"][0] for n in range(12)]
    texts = [choice["text"] for choice in choices]
    assert "" in texts and any(texts)
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [1] * 12


def test_stop_string_removes_logprobs_of_cut_text(client):
    whole = complete(client, logprobs=0).json()["choices"][0]
    cut = complete(client, logprobs=0, stop=whole["text"][3:5]).json()["choices"][0]
    assert len("".join(cut["logprobs"]["tokens"])) <= len(whole["text"])
    assert len(cut["logprobs"]["tokens"]) < len(whole["logprobs"]["tokens"])


def test_logprobs_false_omits_logprobs(client):
    assert complete(client, logprobs=False).json()["choices"][0]["logprobs"] is None
    logprobs = complete(client, logprobs=True).json()["choices"][0]["logprobs"]
    assert len(logprobs["top_logprobs"][0]) >= 1


def test_grammar_excludes_open_reasoning(tmp_path):
    thinks = TEMPLATE + "<think>\n"
    path = make_gguf(tmp_path / "thinks.gguf", "llama", chat_template=thinks)
    with app_client(app_of(opened(path), NAME)) as client:
        assert text_of(chat(client)).startswith("<think>")
        response_format = {"type": "json_object", "schema": {"enum": [5]}}
        assert json.loads(text_of(chat(client, response_format=response_format))) == 5


def test_end_token_of_chat_has_no_logprob(client):
    answer = chat(client, grammar='root ::= "a"', max_tokens=9, logprobs=True).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert len(answer["choices"][0]["logprobs"]["content"]) == 1
