"""Build prompts with tools and determine the format of the answers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pop_base.errors import PopError
from pop_local.engine.chat_messages import Message
from pop_local.engine.decode.grammar import Grammar, JsonRule, json_rule, unchecked
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.prompt.prompt import THINK, Prompt
from pop_local.engine.prompt.prompter import Prompter
from pop_local.engine.tools import native, text_form
from pop_local.engine.tools.call_form import CallForm, Trigger
from pop_local.engine.tools.native import Rendered
from pop_local.engine.tools.tool import Tool, Tools

_RESERVED_RULES = ("tool-call", "tool-calls", "tool-call-root", "tool-call-first")
# The only call ids that Mistral's template accepts.
_PLAIN_ID = re.compile("[a-zA-Z0-9]{9}")
# A required call may start after the reasoning.
_THOUGHT = re.compile(r"</think>()")
_ANSWER = "pop-answer"
_ROOT = re.compile(r"^root ::= (.*)$", re.MULTILINE)


def prompt_with_tools(
    prompter: Prompter, messages: Sequence[Message], tools: Tools, schema: Any = None
) -> tuple[Prompt, CallForm | None]:
    """Return two values: a prompt that describes the tools, and the format of tool calls.

    `schema`: the JSON schema for answers that contain no call (None: any text). If llama.cpp
    supports the template, the template defines the format. For other templates, calls are plain
    text. The format is None if no tool may be called. Raises PopError if the model has no template
    or its template rejects the conversation. Raises GrammarError if a schema is invalid.
    """
    if not prompter.has_template:
        hint = "remove the tools, or use a model with a chat template"
        raise PopError("the model cannot call tools because it has no chat template", hint)
    rules = {tool.name: json_rule(tool.schema) for tool in tools.all}
    answer = None if schema is None or tools.must_call else json_rule(schema)
    own = _Native(prompter, messages, tools)
    if own.is_known:
        prompt = own.prompt()
        if not tools.callable_:
            return prompt, None
        return replace(prompt, begun=""), own.form(rules, answer)
    prompt = prompter.conversation(text_form.with_tools(messages, tools.all))
    if not tools.callable_:
        return prompt, None
    begun = "" if tools.must_call or answer else prompt.begun
    return replace(prompt, begun=begun), _text_form(tools, rules, answer)


class _Native:
    """A conversation with tools, rendered by llama.cpp in the template's format."""

    def __init__(self, prompter: Prompter, messages: Sequence[Message], tools: Tools) -> None:
        self._prompter, self._messages, self._tools = prompter, _numbered(messages), tools
        self._rendered: Rendered | None = None
        with suppress(ValueError):  # the template may accept calls as plain text
            self._rendered = self._render([message.content for message in messages], str)

    @property
    def is_known(self) -> bool:
        """Return True if the template renders tools and llama.cpp provides a grammar for calls."""
        rendered, tools = self._rendered, self._tools.all
        if rendered is None or not rendered.takes_tools:
            return False
        # A tool's rule must not replace one of llama.cpp's rules.
        is_clear = all(f"tool-{tool.rule}" not in _RESERVED_RULES for tool in tools)
        return not tools or (bool(rendered.grammar) and is_clear)

    def prompt(self) -> Prompt:
        """Render the conversation, treating special tokens in its strings as plain text."""
        others = _texts([_calls(message) for message in self._messages])
        others += _texts([tool.openai for tool in self._tools.all])
        prompt = self._prompter.render(
            self._messages, others, lambda *arguments: self._render(*arguments).prompt
        )
        assert self._rendered is not None
        return replace(prompt, stops=(*prompt.stops, *self._rendered.stops))

    def _render(
        self, contents: list[str], marked: Callable[[str], str], only: Sequence[Tool] = ()
    ) -> Rendered:
        """Render the conversation. `only`: the tools to include (default: all)."""
        pairs = zip(self._messages, contents, strict=True)
        messages = [
            {"role": message.role, "content": content, **_mapped(_calls(message), marked)}
            for message, content in pairs
        ]
        tools = [_mapped(tool.openai, marked) for tool in only or self._tools.all]
        several = self._tools.several
        return native.render(self._prompter.template, messages, tools, several=several)

    def form(self, rules: dict[str, JsonRule], answer: JsonRule | None) -> CallForm:
        """Return the call format. `answer`: the rule for answers with no call (None: any text)."""
        tools, rendered = self._tools, self._rendered
        assert rendered is not None
        if tools.callable_ != tools.all:
            contents = [message.content for message in self._messages]
            rendered = self._render(contents, str, tools.callable_)
        instead = {f"tool-{tool.rule}-schema": rules[tool.name] for tool in tools.callable_}
        thinks = tools.must_call and rendered.prompt.rstrip().endswith(THINK)
        gbnf = (
            _ROOT.sub(r"root ::= [ \\n]{0,4} (\1)", rendered.grammar)
            if thinks
            else rendered.grammar
        )
        if answer is not None:
            gbnf = _ROOT.sub(rf"root ::= (\1) | {_ANSWER}", gbnf) + f'\n{_ANSWER} ::= ""'
            instead[_ANSWER] = answer
        grammar = Grammar.of_gbnf(gbnf, instead)
        special_tokens = frozenset(self._shown(rendered))
        if answer is not None:
            triggers: tuple[Trigger, ...] = ()
        elif not tools.must_call:
            triggers = tuple(
                Trigger(_pattern(trigger), {"": grammar}) for trigger in rendered.triggers
            )
            triggers += (_in_json(tools, rules),)
        else:
            triggers = (Trigger(_THOUGHT, {"": grammar}),) if thinks else ()
        return CallForm(
            tools.callable_, tools.must_call, triggers, grammar, special_tokens, rendered.format
        )

    def _shown(self, rendered: Rendered) -> Iterator[int]:
        """Yield the format's special tokens, except visible tokens and end tokens."""
        context = self._prompter.context
        pieces = Pieces(context.vocabulary)
        for text in rendered.shown:
            for token in context.vocabulary.tokenize(text, special=True):
                if not pieces[token] and not context.vocabulary.is_end(token):
                    yield token


def _text_form(tools: Tools, rules: dict[str, JsonRule], answer: JsonRule | None) -> CallForm:
    called = [(tool, rules[tool.name].text) for tool in tools.callable_]
    ignored = [name for tool in tools.callable_ for name in rules[tool.name].ignored]
    lark = text_form.lark(called, several=tools.several)
    if answer is not None:
        lark = lark.replace("start: ", "start: answer | ", 1) + f"\nanswer: {answer.text}"
        ignored += answer.ignored
    grammar = Grammar.of_lark(lark, "a tool's schema", ignored)
    triggers: tuple[Trigger, ...] = ()
    if not tools.must_call and answer is None:
        tagged = Trigger(re.compile("(<tool_call>)"), {"": grammar})
        triggers = (tagged, _in_json(tools, rules))
    return CallForm(tools.callable_, tools.must_call, triggers, grammar)


def _in_json(tools: Tools, rules: dict[str, JsonRule]) -> Trigger:
    """Return a trigger for fenced JSON, which models such as Qwen2.5-Coder generate."""
    rest = {name: unchecked(text_form.rest_of_json(rules[name].text)) for name in tools.names}
    return Trigger(text_form.opening(tools.names), rest)


def _pattern(trigger: dict[str, str]) -> re.Pattern[str]:
    """Convert a common_grammar_trigger from llama.cpp to a pattern with a group."""
    value, is_pattern = trigger["value"], trigger["type"].startswith("pattern")
    pattern = re.compile(value if is_pattern else re.escape(value))
    return pattern if pattern.groups else re.compile(f"({pattern.pattern})")


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """Replace IDs in calls and results with IDs that every template accepts.

    Ollama clients send results without IDs. Each one is assigned to the first unanswered call.
    """
    numbered: list[Message] = []
    open_: dict[str, str] = {}
    n_calls = 0
    for message in messages:
        calls = []
        for call in message.calls:
            n_calls += 1
            plain = call.id if _PLAIN_ID.fullmatch(call.id) else f"call{n_calls:05d}"
            open_[call.id or plain] = plain
            calls.append(replace(call, id=plain))
        answered = message.call_id
        if message.role == "tool":
            call_id = answered if answered in open_ else next(iter(open_), answered)
            answered = open_.pop(call_id, call_id)
        numbered.append(replace(message, calls=tuple(calls), call_id=answered))
    return numbered


def _calls(message: Message) -> dict[str, Any]:
    """Return a message's calls, or a tool message's call ID, in OpenAI's format."""
    if message.role == "tool":
        return {"tool_call_id": message.call_id}
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.calls
    ]
    return {"tool_calls": calls} if calls else {}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a JSON value with `change` applied to every string, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> list[str]:
    texts: list[str] = []
    _mapped(value, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    return texts
