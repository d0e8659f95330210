"""Tools: their descriptions in prompts, constraints on answers, and parsed calls."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from pop_base.errors import PopError
from pop_local.engine.chat_messages import Message, ToolCall
from pop_local.engine.decode.grammar import GrammarError
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.tools import text_form
from pop_local.engine.tools.call_form import CallConstraint, CallForm
from pop_local.engine.tools.prompts import prompt_with_tools
from pop_local.engine.tools.reader import CallReader, calls_of
from pop_local.engine.tools.tool import Tool, Tools
from support.calls import opened, text_of
from support.chat_tools import QWEN, TEMPLATES
from support.converted import tiny
from support.synthetic import TEMPLATE, make_gguf

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = Tool("get_weather", "The weather of a city", CITY)
DOUBLE = Tool("double", "Twice as much", {"properties": {"n": {"type": "integer"}}})
BOTH = (WEATHER, DOUBLE)
ASKED = Message("user", "How is it there?")
CALL = ToolCall("abcdefgh1", "get_weather", '{"city": "Rome"}')
NATIVE = '<tool_call>\n{"name": "get_weather", "arguments": {"city":"Rome"}}\n</tool_call>'
FENCED = '```json\n{\n  "name": "get_weather",\n  "arguments": {"city": "Rome"}\n}\n```'
TAGGED = '<response>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</response>'
DOUBLED = '{{"name": "get_weather", "arguments": {"city": "Rome"}}}'
CALLS = {"tags": NATIVE, "fence": FENCED, "braces": DOUBLED, "other tags": TAGGED}


@pytest.fixture(scope="module", params=["native", "text"])
def model(request, tmp_path_factory):
    template = TEMPLATES[QWEN].read_text() if request.param == "native" else TEMPLATE
    folder = tmp_path_factory.mktemp("tools")
    with opened(tiny(folder, chat_template=template), n_ctx=4096) as model:
        yield model


def form_of(model: Any, tools: Tools) -> CallForm:
    _, form = prompt_with_tools(model.engine.prompter, [ASKED], tools)
    assert form is not None
    return form


def allowed(model: Any, form: CallForm, text: str) -> str:
    """Return the prefix of a text that the form allows, token by token."""
    trie = model.engine.token_tries.get(form.shown)
    constraint = CallConstraint(trie, Pieces(model.engine.context.vocabulary, form.shown), form)
    text_bytes = b""
    for token in trie.greedy_tokenize(text):
        ids = constraint.allowed()
        if ids is not None and token not in ids:
            break
        constraint.accept(token)
        text_bytes += trie.decode_bytes([token])
    return text_bytes.decode()


def read(form: CallForm, text: str) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(form)
    pieces = [piece for char in text for piece in reader.push(char)] + reader.end()
    content = "".join(piece.content for piece in pieces)
    return content, [(call.name, call.arguments) for call in calls_of(pieces)]


def test_no_text_precedes_required_call(model):
    form = form_of(model, Tools(BOTH, BOTH, must_call=True))
    assert allowed(model, form, NATIVE) == NATIVE
    assert allowed(model, form, "It") == ""
    assert allowed(model, form, NATIVE.replace("Rome", "Oslo")).endswith('"city":"')


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments_of_an_optional_call_follow_the_schema(model, call):
    form = form_of(model, Tools(BOTH, BOTH))
    text = "Any text, {, `, and <tool>."
    assert allowed(model, form, text) == text
    assert allowed(model, form, call) == call
    assert allowed(model, form, call.replace("Rome", "Oslo")).rstrip().endswith('"')
    assert "Oslo" not in allowed(model, form, call.replace("Rome", "Oslo"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call_is_parsed_and_other_json_is_content(model, call):
    form = form_of(model, Tools(BOTH, BOTH))
    content, calls = read(form, call)
    assert content == "" and [name for name, _ in calls] == ["get_weather"]
    assert json.loads(calls[0][1]) == {"city": "Rome"}
    other = call.replace("get_weather", "get_news")
    assert read(form, other) == (other, [])
    for text in ('{"a": 1}', "```python\nname = 1\n```", "Hello.", "`", "<tool", ""):
        assert read(form, text) == (text, [])


def test_content_before_a_call_is_not_delayed(model):
    reader = CallReader(form_of(model, Tools(BOTH, BOTH)))
    assert [piece.content for piece in reader.push("Let me see. ")] == ["Let me see. "]
    pieces = reader.push(NATIVE) + reader.end()
    assert [call.name for call in calls_of(pieces)] == ["get_weather"]


def test_truncated_call_has_partial_arguments(model):
    form = form_of(model, Tools(BOTH, BOTH))
    content, calls = read(form, FENCED[: FENCED.index("ome")])
    assert content == "" and calls == [("get_weather", '{"city": "R')]
    for end in ("\n", "</tool_", "</tool_call"):
        closed = NATIVE[: NATIVE.index(end, 12) + len(end)]
        assert read(form, closed) == ("", [("get_weather", '{"city":"Rome"}')])


def test_only_named_tool_may_be_called(model):
    prompt, form = prompt_with_tools(
        model.engine.prompter, [ASKED], Tools(BOTH, (DOUBLE,), must_call=True)
    )
    assert form is not None and form.tools == (DOUBLE,)
    assert "get_weather" in text_of(model, prompt.tokens)
    assert "get" not in allowed(model, form, NATIVE)


def test_several_calls_need_the_option(model):
    for several in (True, False):
        form = form_of(model, Tools(BOTH, BOTH, must_call=True, several=several))
        twice = f"{NATIVE}\n{NATIVE}"
        assert (allowed(model, form, twice) == twice) == several
        assert allowed(model, form, NATIVE) == NATIVE


def test_call_follows_open_reasoning(tmp_path):
    template = TEMPLATES["Qwen-QwQ-32B"].read_text()
    with opened(tiny(tmp_path, chat_template=template), n_ctx=4096) as model:
        form = form_of(model, Tools(BOTH, BOTH, must_call=True))
        thought = "Rome, then.\n</think>\n\n"
        assert allowed(model, form, thought + NATIVE) == thought + NATIVE
        assert allowed(model, form, thought + "It") == thought
        assert read(form, thought + NATIVE)[1] == [("get_weather", '{"city":"Rome"}')]


def test_excess_brackets_do_not_end_arguments(model):
    form = form_of(model, Tools(BOTH, BOTH))
    text = '<tool_call>\n{"name": "get_weather", "arguments": ' + "[" * 100_000
    reader = CallReader(form)
    began_s = time.monotonic()
    pieces = reader.push(text) + reader.push("[") + reader.end()
    assert time.monotonic() - began_s < 20
    assert [call.arguments for call in calls_of(pieces)] == ["[" * 100_001]


@pytest.mark.parametrize("names", [("a", "a"), ("get_a", "get-a")])
def test_tools_of_equal_names_are_refused(names):
    tools = tuple(replace(WEATHER, name=name) for name in names)
    with pytest.raises(PopError, match="two tools have the same name"):
        Tools(tools, tools)


def test_invalid_tool_schema_is_refused(model):
    tool = replace(WEATHER, parameters={"type": "object", "properties": {"a": {"type": "any"}}})
    with pytest.raises(GrammarError):
        prompt_with_tools(model.engine.prompter, [ASKED], Tools((tool,), (tool,)))


def test_model_without_a_template_refuses_tools(tmp_path):
    with opened(tiny(tmp_path)) as model, pytest.raises(PopError, match="no chat template"):
        prompt_with_tools(model.engine.prompter, [ASKED], Tools(BOTH, BOTH))


@pytest.mark.parametrize("name", [QWEN, "microsoft-Phi-3.5-mini-instruct"])
def test_special_tokens_in_descriptions_arguments_and_results_are_text(tmp_path, name):
    control = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>"]
    path = make_gguf(
        tmp_path / "m.gguf",
        "llama",
        n_vocab=400,
        control=control,
        chat_template=TEMPLATES[name].read_text(),
    )

    def n_special(model: Any, spelled: str) -> list[int]:
        tool = replace(WEATHER, description=spelled)
        call = replace(CALL, arguments=json.dumps({"city": spelled}))
        messages = [
            ASKED,
            Message("assistant", "", calls=(call,)),
            Message("tool", spelled, call_id=CALL.id),
        ]
        prompt, _ = prompt_with_tools(model.engine.prompter, messages, Tools((tool,), (tool,)))
        texts = [text_of(model, [token]) for token in prompt.tokens]
        return [texts.count(token) for token in control]

    with opened(path, n_ctx=8192) as model:
        assert n_special(model, "<|im_end|><|end|>\n<|im_start|>") == n_special(model, "Rome")
        assert sum(n_special(model, "Rome")) > 0


def test_text_form_inserts_calls_and_results_into_messages():
    messages = [
        Message("system", "Be brief."),
        ASKED,
        Message("assistant", "I look.", calls=(CALL,)),
        Message("tool", "rain", call_id="abcdefgh1"),
        Message("tool", "sun", call_id="abcdefgh2"),
    ]
    system, user, assistant, results = text_form.with_tools(messages, BOTH)
    assert system.content.startswith("Be brief.\n\n") and '"double"' in system.content
    assert user == ASKED
    assert assistant.content == "I look.\n" + NATIVE.replace(':"', ': "')
    assert (results.role, results.content.count("<tool_response>")) == ("user", 2)
    assert text_form.with_tools([ASKED], BOTH)[0].role == "system"
    assert text_form.with_tools([ASKED], ()) == [ASKED]


def test_repeated_call_ends_the_answer(model):
    form = form_of(model, Tools(BOTH, BOTH))
    other = NATIVE.replace("Rome", "Paris")
    for calls in ([NATIVE, other, NATIVE], [NATIVE, other, other, NATIVE]):
        assert allowed(model, form, "\n".join(calls)).count("<tool_call>") == 3


CALLED = [("get_weather", {"city": "Rome"})]
PYTHON = '```python\nget_weather(city="Rome")\n```'
JSON = '```json\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n```'


@pytest.mark.parametrize("fence", [PYTHON, JSON, PYTHON[:-4], JSON.replace("json", "")])
def test_code_fence_at_the_end_is_a_call(model, fence):
    form = form_of(model, Tools(BOTH, BOTH))
    text = f"Let me see.\n\n{fence}\n"
    content, calls = read(form, text)
    assert content == text
    assert [(name, json.loads(arguments)) for name, arguments in calls] == CALLED
    assert allowed(model, form, text) == text


def test_python_calls_support_several_value_types(model):
    form = form_of(model, Tools(BOTH, BOTH))
    _, calls = read(form, '```py\nget_weather(city="Rome\\d")\n\ndouble(n=-3)\n```')
    assert calls == [("get_weather", '{"city": "Rome\\\\d"}'), ("double", '{"n": -3}')]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{PYTHON}\nThis calls the tool.", "followed by text"),
        (f"Like so:\n{JSON}\nThis calls the tool.", "followed by text"),
        ('get_weather(city="Rome")', "has an unknown format"),
        ("<function=get_weather><parameter=city>Rome</parameter></function>", "unknown format"),
        ('Now:\n```json\n{"tool": "get_weather", "city": "Rome"}\n```', "neither valid JSON nor"),
        (PYTHON.replace('"Rome"', "city"), "neither valid JSON nor"),
        (PYTHON.replace('city="Rome"', '"Rome"'), "neither valid JSON nor"),
        (PYTHON.replace("get_", "x = get_"), "neither valid JSON nor"),
        (PYTHON.replace('city="Rome"', '**{"city": "Rome"}'), "neither valid JSON nor"),
        (PYTHON.replace('"Rome"', '{"Rome"}'), "neither valid JSON nor"),
        (PYTHON.replace('"Rome"', "(" * 5000), "neither valid JSON nor"),
        (PYTHON.replace("city", "town"), "invalid arguments"),
        (PYTHON.replace('city="Rome"', ""), "invalid arguments"),
        (PYTHON.replace("\n```", "\nprint(n=1)\n```"), "invalid arguments"),
        (JSON.replace("city", "town").replace("`", "Now:\n`", 1), "invalid arguments"),
        ("```python\nprint(6 * 7)\n```", ""),
        ("I have no use for get_weather.", ""),
    ],
)
def test_text_without_call_is_returned_with_reason(model, text, reason, capfd):
    reader = CallReader(form_of(model, Tools(BOTH, BOTH)))
    pieces = [piece for char in text for piece in reader.push(char)] + reader.end()
    assert ("".join(piece.content for piece in pieces), reader.n_calls) == (text, 0)
    assert reason in reader.no_call and bool(reason) == bool(reader.no_call)
    assert "Rome" not in reader.no_call and capfd.readouterr() == ("", "")
