"""A PopModel as a `llama_cpp.Llama`: completions and chats, and they prune.

The model is random, so that an answer of a form is the grammar's doing.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pop_converter.base.errors import PopError
from pop_local import PopModel
from pop_local.engine.decode.grammar import GrammarError
from pop_local.engine.llama import backend
from support.converted import tiny
from support.synthetic import TEMPLATE

TEXT = "a b c d e f g h " * 20
MESSAGES: Any = [{"role": "user", "content": TEXT}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
SCHEMA = {
    "type": "object",
    "properties": {"when": {"type": "boolean"}, "who": {"enum": ["Anna", "Mara"]}},
    "required": ["when", "who"],
}
FORMAT: Any = {"type": "json_object", "schema": SCHEMA}
FULL_ROWS = 17  # the first token, and the prompt's tail


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tiny(tmp_path_factory.mktemp("llama"), boundary=5, chat_template=TEMPLATE)
    with PopModel.open(file, n_ctx=1024, n_threads=1) as opened:
        yield opened


def pruned(model: PopModel, ask: Callable[[], Any]) -> Any:
    """A request with a prompt whose context tokens are all pruned and whose tail is not."""
    model.cache.clear()
    backend.reset_counters(model.context.ctx)
    reply = ask()
    counters = backend.get_counters(model.context.ctx)
    n_prompt = len(model.tokenize(TEXT))
    assert counters.n_context >= n_prompt - FULL_ROWS
    if "usage" in reply:
        assert counters.n_context == reply["usage"]["prompt_tokens"] - FULL_ROWS
        # The last token is sampled and not decoded.
        assert counters.n_full - FULL_ROWS <= reply["usage"]["completion_tokens"]
    return reply


def chat(model: PopModel, messages: Any, **options: Any) -> Any:
    return model.as_llama().create_chat_completion(messages, **options)


def joined(chunks: Any) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def content(reply: Any) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def test_a_call_is_a_completion(model):
    called = pruned(model, lambda: model.as_llama()(TEXT, **GREEDY))
    completed = pruned(model, lambda: model.as_llama().create_completion(TEXT, **GREEDY))
    streamed = pruned(model, lambda: list(model.as_llama()(TEXT, stream=True, **GREEDY)))
    assert called["choices"] == completed["choices"]
    text = completed["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text != ""


def test_a_chat_at_once_and_in_pieces(model):
    reply = pruned(model, lambda: chat(model, MESSAGES, **GREEDY))
    chunks = pruned(
        model,
        lambda: list(chat(model, MESSAGES, stream=True, **GREEDY)),
    )
    assert joined(chunks) == content(reply) != ""
    assert chunks[-1]["choices"][0]["finish_reason"] == reply["choices"][0]["finish_reason"]


def test_a_stop_string_ends_a_chat(model):
    whole = content(pruned(model, lambda: chat(model, MESSAGES, **GREEDY)))
    stop = whole[len(whole) // 2 :][:2]
    expected = whole[: whole.index(stop)]
    options = GREEDY | {"stop": [stop]}
    reply = pruned(model, lambda: chat(model, MESSAGES, **options))
    assert (content(reply), reply["choices"][0]["finish_reason"]) == (expected, "stop")
    chunks = pruned(
        model,
        lambda: list(chat(model, MESSAGES, stream=True, **options)),
    )
    assert joined(chunks) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_a_json_schema(model, temperature):
    options: Any = {"response_format": FORMAT, "temperature": temperature, "max_tokens": 200}
    reply = pruned(model, lambda: chat(model, MESSAGES, seed=1, **options))
    answered = json.loads(content(reply))
    assert isinstance(answered["when"], bool)
    assert answered["who"] in ("Anna", "Mara")
    chunks = pruned(
        model,
        lambda: list(chat(model, MESSAGES, seed=1, stream=True, **options)),
    )
    assert json.loads(joined(chunks)) == answered


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": {"const": "C:\\new\nline"}},
        {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"enum": ["C:\\new\nline"]}},
        },
    ],
)
def test_json_that_is_asked_for_is_escaped(model, form):
    reply = chat(model, MESSAGES, response_format=form, max_tokens=60)
    assert json.loads(content(reply)) == "C:\\new\nline"


def test_what_of_a_form_is_not_enforced_is_a_warning(model):
    form = {"type": "json_object", "schema": {"enum": [[1]], "uniqueItems": True}}
    with pytest.warns(UserWarning, match="uniqueItems"):
        reply = chat(model, MESSAGES, response_format=form, max_tokens=60)
    assert json.loads(content(reply)) == [1]


def test_an_answer_without_a_form_is_any_text(model):
    for form in (None, {"type": "text"}):
        reply = chat(model, MESSAGES, response_format=form, **GREEDY)
        assert content(reply) == content(chat(model, MESSAGES, **GREEDY))


@pytest.mark.parametrize(
    "form",
    [{"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "schema": {"type": 5}}],
)
def test_a_form_that_cannot_be_kept_to_is_refused(model, form):
    with pytest.raises(GrammarError):
        chat(model, MESSAGES, response_format=form)


def test_a_logits_processor_is_given_the_tokens_so_far(model):
    given: list[list[int]] = []

    def note(tokens: Any, logits: Any) -> Any:
        given.append(tokens.tolist())
        return logits

    for text in (b"a b c", b"d e"):
        given.clear()
        llama = model.as_llama()
        prompt = llama.tokenize(text)
        steps = llama.generate(prompt, logits_processor=[note], temp=0.0)
        sampled = [next(steps), next(steps)]
        assert given == [prompt, [*prompt, sampled[0]]]


def test_typical_p_is_kept_to(model):
    """Where little is typical, less is left to choose from."""
    llama = model.as_llama()
    wide = {"temp": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def first(seed: int, **options: Any) -> int:
        llama.set_seed(seed)
        return next(llama.generate(llama.tokenize(b"a b c"), **wide, **options))

    n_wide, n_typical = (
        len({first(seed, **options) for seed in range(30)}) for options in ({}, {"typical_p": 0.01})
    )
    assert n_typical < n_wide / 2


@pytest.mark.parametrize("option", [{"logit_bias": {"5": 1.0}}, {"typical_p": 0.5}])
def test_what_does_not_go_with_a_form_is_refused(model, option):
    with pytest.raises(PopError, match="do not go with a grammar"):
        chat(model, MESSAGES, response_format=FORMAT, **option)


def test_tools_are_shown_by_the_template(tmp_path):
    template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "a b c", "parameters": {"type": "object"}}}]
    with PopModel.open(tiny(tmp_path, chat_template=template), n_ctx=256) as model:
        n = [
            chat(model, [{"role": "user", "content": "d"}], max_tokens=1, **more)["usage"]
            for more in ({}, {"tools": tools})
        ]
    assert n[0]["prompt_tokens"] < n[1]["prompt_tokens"]


def test_a_closed_model_is_an_error(tmp_path):
    model = PopModel.open(tiny(tmp_path), n_ctx=256)
    llama = model.as_llama()
    model.close()
    for use in (lambda: llama.tokenize(b"a"), lambda: llama("a"), llama.token_eos):
        with pytest.raises(PopError, match="is closed"):
            use()
