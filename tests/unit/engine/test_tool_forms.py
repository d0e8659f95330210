"""Public chat templates: prompts describe tools, and calls are parsed.

A model was trained to write calls as its template renders earlier ones. The grammar determines
their end.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from pop_local.engine.chat_messages import Message, ToolCall
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prompt.prompt import THINK, Prompt
from pop_local.engine.prompt.prompter import Prompter, Write
from pop_local.engine.prompt.templates import Template
from pop_local.engine.tools.call_form import CallConstraint, CallForm
from pop_local.engine.tools.prompts import prompt_with_tools
from pop_local.engine.tools.reader import CallReader, calls_of
from pop_local.engine.tools.tool import Tool, Tools
from support.calls import opened
from support.chat_tools import TEMPLATES
from support.converted import tiny
from support.synthetic import TEMPLATE

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = (
    Tool("get_weather", "The weather of a city", CITY),
    Tool("double", "Twice as much", NUMBER),
)
CALLS = (
    ToolCall("abcdefgh1", "get_weather", '{"city": "New York"}'),
    ToolCall("abcdefgh2", "double", '{"n": 21}'),
)
ASKED = Message("user", "What is it like?")
END = "the-end-of-it"
N_TAG = 40
THOUGHT = "It is so."


@dataclass(frozen=True)
class Written:
    """A form, and an answer as the template renders it, up to the grammar's end."""

    form: CallForm
    text: str


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(tiny(tmp_path_factory.mktemp("forms"), chat_template=TEMPLATE)) as model:
        yield model


class Shown(Prompter):
    """A prompter that stores its last prompt's text."""

    shown = ""

    def render(self, messages: Sequence[Message], others: Sequence[str], write: Write) -> Prompt:
        self.shown = write([message.content for message in messages], str)
        return super().render(messages, others, write)


def prompter_of(model: Any, name: str) -> Shown:
    prompter = Shown(model.engine.context)
    vars(prompter)["template"] = Template(
        TEMPLATES[name].read_text(), model.engine.context.vocabulary.pointer
    )
    return prompter


def written(model: Any, name: str, calls: tuple[ToolCall, ...]) -> Written:
    prompter = prompter_of(model, name)
    tools = Tools(TOOLS, TOOLS, several=len(calls) > 1)

    def text_of(*messages: Message) -> str:
        prompt_with_tools(prompter, messages, tools)
        return prompter.shown

    _, form = prompt_with_tools(prompter, [ASKED], tools)
    assert form is not None
    results = [Message("tool", END, call_id=call.id) for call in calls]
    before, after = text_of(ASKED), text_of(ASKED, Message("assistant", "", calls=calls), *results)
    differ = (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    n_same = next(differ, len(before))
    thought = f"{THOUGHT}\n</think>\n\n" if before.rstrip().endswith(THINK) else ""
    # Two tags may share a prefix.
    answer = after[max(0, n_same - N_TAG) : after.index(END, n_same)]
    text = _accepted(form, answer, N_TAG)
    return Written(form, thought + text if text else "")


def _accepted(form: CallForm, answer: str, start: int) -> str:
    """Return the longest text, from `start` or a trigger, that the grammar accepts."""
    assert form.grammar is not None
    tokenizer = LLTokenizer("byte")
    starts = [start]
    for trigger in form.triggers:
        if match := trigger.pattern.search(answer):
            starts.append(next(span[0] for span in match.regs[1:] if span[0] >= 0))
    longest = ""
    for at in starts:
        matcher = LLMatcher(tokenizer, form.grammar.text, log_level=0)
        raw = answer[at:].encode()
        for n, byte in enumerate(raw, 1):
            if not matcher.consume_token(byte) or matcher.is_error():
                break
            if matcher.is_accepting():
                longest = max(longest, raw[:n].decode(errors="ignore"), key=len)
    return longest


def read(form: CallForm, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(form)
    read_pieces = [piece for text in pieces for piece in reader.push(text)] + reader.end()
    content = "".join(piece.content for piece in read_pieces)
    content = content.replace(f"{THOUGHT}\n</think>", "").strip()  # shown in the text form
    return content, [(call.name, json.loads(call.arguments)) for call in calls_of(read_pieces)]


# One template per family; POP_TEST_TEMPLATES=all tests all of llama.cpp's.
FAMILIES = (
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen3-Coder",
    "meta-llama-Llama-3.2-3B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "openai-gpt-oss-120b",
    "deepseek-ai-DeepSeek-V3.2",
    "ibm-granite-granite-4.0",
    "LFM2-8B-A1B",
    "google-gemma-4-31B-it",
    "HuggingFaceTB-SmolLM3-3B",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
)
TRIED = TEMPLATES if os.environ.get("POP_TEST_TEMPLATES") == "all" else FAMILIES
# These templates render no earlier calls, or not in their grammar's form.
BY_HAND = {
    "LFM2-8B-A1B": '<|tool_call_start|>[get_weather(city="New York"){}]<|tool_call_end|>',
    "LFM2.5-Instruct": '<|tool_call_start|>[get_weather(city="New York"){}]<|tool_call_end|>',
}
PYTHONIC = ", double(n=21)"
# Parsed calls by template, for answers with one and with two calls, if not (1, 2).
OTHERWISE = {
    "Apriel-1.6-15b-Thinker-fixed": (0, 0),
    "Kimi-K3": (0, 0),
    "tencent-Hy3": (0, 2),
    "unsloth-Apriel-1.5": (0, 0),
    "upstage-Solar-Open-100B": (0, 0),
    # These allow one call per answer.
    "GigaChat3-10B-A1.8B": (1, 1),
    "GigaChat3.1-10B-A1.8B": (1, 1),
    "meetkai-functionary-medium-v3.2": (1, 1),
    "openai-gpt-oss-120b": (1, 1),
    "meta-llama-Llama-3.1-8B-Instruct": (1, 0),
    "meta-llama-Llama-3.2-3B-Instruct": (1, 0),
    "meta-llama-Llama-3.3-70B-Instruct": (1, 0),
    "MiniMax-M1": (1, 0),
    "MiniMax-M2": (1, 0),
    "llama-cpp-deepseek-r1": (0, 2),
}
REFUSED = "fireworks-ai-llama-3-firefunction-v2"  # its template needs fields of no client


@pytest.mark.parametrize("name", [name for name in TRIED if name != REFUSED])
def test_calls_are_parsed_in_any_chunks(model, name):
    for calls, n_read in zip((CALLS[:1], CALLS), OTHERWISE.get(name, (1, 2)), strict=True):
        shown = written(model, name, calls)
        if name in BY_HAND:
            text = BY_HAND[name].format(PYTHONIC if len(calls) > 1 else "")
            shown = Written(shown.form, _accepted(shown.form, text, 0))
        expected = [(call.name, json.loads(call.arguments)) for call in calls[:n_read]]
        assert read(shown.form, [shown.text]) == ("", expected)
        assert read(shown.form, list(shown.text)) == ("", expected)


AS_TEXT = {
    *("HuggingFaceTB-SmolLM3-3B", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"),
    *("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1"),
    *("google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world"),
    "microsoft-Phi-3.5-mini-instruct",
}


@pytest.mark.parametrize("name", [name for name in TRIED if name != REFUSED])
def test_prompt_describes_each_tool(model, name):
    prompter = prompter_of(model, name)
    _, form = prompt_with_tools(prompter, [ASKED], Tools(TOOLS, TOOLS))
    assert form is not None and (form.native is None) == (name in AS_TEXT)
    assert all(tool.name in prompter.shown for tool in TOOLS)


@pytest.mark.parametrize("name", [name for name in TRIED if name != REFUSED])
def test_answer_continues_until_required_call(model, name):
    prompter = prompter_of(model, name)
    for several in (True, False):
        tools = Tools(TOOLS, TOOLS, must_call=True, several=several)
        _, form = prompt_with_tools(prompter, [ASKED], tools)
        assert form is not None
        trie = model.engine.token_tries.get(form.shown)
        constraint = CallConstraint(trie, Pieces(model.engine.context.vocabulary, form.shown), form)
        for text in ("", "\n", " "):
            ids = constraint.allowed()
            assert ids is not None and not set(trie.eos_tokens) & set(ids)
            for token in trie.greedy_tokenize(text):
                if token in ids:
                    constraint.accept(token)


@pytest.mark.parametrize("id_", ["", "call_0123456789"])
def test_mistral_template_accepts_foreign_call_ids(model, id_):
    prompter = prompter_of(model, "mistralai-Mistral-Nemo-Instruct-2407")
    calls = tuple(replace(call, id=id_ and f"{id_}{n}") for n, call in enumerate(CALLS))
    results = [Message("tool", "rain", call_id=call.id) for call in calls]
    messages = [ASKED, Message("assistant", "", calls=calls), *results]
    _, form = prompt_with_tools(prompter, messages, Tools(TOOLS, TOOLS))
    assert form is not None and form.native is not None
    assert "call00001" in prompter.shown and "call00002" in prompter.shown
