"""The prompt of a conversation with tools, and the form of its answer."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pop_converter.base.errors import PopError
from pop_local.engine.chat_messages import Message
from pop_local.engine.decode.grammar import Grammar, JsonRule, json_rule, unchecked
from pop_local.engine.llama.pieces import Pieces
from pop_local.engine.prompt.prompt import THINK, Prompt
from pop_local.engine.prompt.prompter import Prompter, is_end
from pop_local.engine.tools import native, text_form
from pop_local.engine.tools.form import CallForm, Trigger
from pop_local.engine.tools.native import Rendered
from pop_local.engine.tools.tool import Tool, Tools

_OWN_RULES = ("tool-call", "tool-calls", "tool-call-root", "tool-call-first")
# The ids of calls that the template of Mistral takes.
_PLAIN_ID = re.compile("[a-zA-Z0-9]{9}")
# Behind it a call may begin where one has to come.
_THOUGHT = re.compile(r"</think>()")
_ROOT = re.compile(r"^root ::= (.*)$", re.MULTILINE)


def prompt_with_tools(
    prompter: Prompter, messages: Sequence[Message], tools: Tools
) -> tuple[Prompt, CallForm | None]:
    """Return the prompt that tells of the tools, and how its answer calls them.

    In the template's own form where llama.cpp knows it, else as text. Where no tool may be called
    the form is None. Raises PopError where the model has no template, or refuses the conversation,
    and GrammarError for a schema.
    """
    if not prompter.has_template:
        raise PopError("the model has no chat template: it knows no tools", "send none")
    rules = {tool.name: json_rule(tool.schema) for tool in tools.told}
    own = _Native(prompter, messages, tools)
    if own.is_known and tools.callable_:
        return replace(own.prompt(), begun=""), own.form(rules)
    if own.is_known:
        return own.prompt(), None
    prompt = prompter.conversation(text_form.with_tools(messages, tools.told))
    if not tools.callable_:
        return prompt, None
    return replace(prompt, begun="" if tools.must_call else prompt.begun), _text_form(tools, rules)


class _Native:
    """A conversation as the template has it, by llama.cpp."""

    def __init__(self, prompter: Prompter, messages: Sequence[Message], tools: Tools) -> None:
        self._prompter, self._messages, self._tools = prompter, _numbered(messages), tools
        self._rendered: Rendered | None = None
        with suppress(ValueError):  # the text form may say it otherwise
            self._rendered = self._render([each.content for each in messages], str)

    @property
    def is_known(self) -> bool:
        """Whether the template shows tools, and there is a form of calls, if any may come."""
        made, told = self._rendered, self._tools.told
        if made is None or not made.takes_tools:
            return False
        # llama.cpp has rules of its own for calls.
        is_clear = all(f"tool-{tool.rule}" not in _OWN_RULES for tool in told)
        return not told or (bool(made.grammar) and is_clear)

    def prompt(self) -> Prompt:
        """Render it, so that special tokens in texts are text."""
        others = [text for message in self._messages for text in _texts(_calls(message))]
        others += _texts([tool.openai for tool in self._tools.told])
        made = self._prompter.written(self._messages, others, self._write)
        assert self._rendered is not None
        return replace(made, stops=(*made.stops, *self._rendered.stops))

    def _write(self, contents: list[str], marked: Callable[[str], str]) -> str:
        try:
            return self._render(contents, marked).prompt
        except ValueError as error:
            raise PopError(f"the chat template refuses this conversation: {error}") from error

    def _render(
        self, contents: list[str], marked: Callable[[str], str], told: Sequence[Tool] | None = None
    ) -> Rendered:
        """`told`: the tools, None for all."""
        said = zip(self._messages, contents, strict=True)
        messages = [_openai(message, content, marked) for message, content in said]
        tools = [_mapped(tool.openai, marked) for tool in told or self._tools.told]
        several = self._tools.several
        return native.render(self._prompter.template, messages, tools, several=several)

    def form(self, rules: dict[str, JsonRule]) -> CallForm:
        """Return the form of the answer; its grammar is that of the callable tools alone."""
        tools, made = self._tools, self._rendered
        assert made is not None
        if tools.callable_ != tools.told:
            contents = [each.content for each in self._messages]
            made = self._render(contents, str, tools.callable_)
        instead = {f"tool-{one.rule}-schema": rules[one.name] for one in tools.callable_}
        thinks = tools.must_call and made.prompt.rstrip().endswith(THINK)
        gbnf = _ROOT.sub(r"root ::= [ \\n]{0,4} (\1)", made.grammar) if thinks else made.grammar
        grammar = Grammar.of_gbnf(gbnf, instead)
        shown = frozenset(self._shown(made))
        if not tools.must_call:
            triggers = tuple(Trigger(_pattern(*one), {"": grammar}) for one in made.triggers)
            triggers += (_in_json(tools, rules),)
        else:
            triggers = (Trigger(_THOUGHT, {"": grammar}),) if thinks else ()
        return CallForm(tuple(tools.names), tools.must_call, triggers, grammar, shown, made.format)

    def _shown(self, made: Rendered) -> Iterator[int]:
        """The tokens of the form that have no text otherwise, but for those that end an answer."""
        context = self._prompter.context
        pieces = Pieces(context)
        for text in made.shown:
            for token in context.tokenize(text, special=True):
                if not pieces[token] and not is_end(context, token):
                    yield token


def _text_form(tools: Tools, rules: dict[str, JsonRule]) -> CallForm:
    called = [(tool, rules[tool.name].text) for tool in tools.callable_]
    ignored = [name for tool in tools.callable_ for name in rules[tool.name].ignored]
    lark = text_form.lark(called, several=tools.several)
    grammar = Grammar.of_lark(lark, "a tool's schema", ignored)
    triggers: tuple[Trigger, ...] = ()
    if not tools.must_call:
        tagged = Trigger(re.compile("(<tool_call>)"), {"": grammar})
        triggers = (tagged, _in_json(tools, rules))
    return CallForm(tuple(tools.names), tools.must_call, triggers, grammar)


def _in_json(tools: Tools, rules: dict[str, JsonRule]) -> Trigger:
    """Qwen2.5-Coder and others write a fence with JSON, whatever the prompt says."""
    rest = {name: unchecked(text_form.rest_of_json(rules[name].text)) for name in tools.names}
    return Trigger(text_form.opening(tools.names), rest)


def _pattern(kind: str, value: str) -> re.Pattern[str]:
    """A trigger of llama.cpp's as a pattern with a group (common_grammar_trigger)."""
    source = value if kind.startswith("pattern") else re.escape(value)
    found = re.compile(source)
    return found if found.groups else re.compile(f"({source})")


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """Give calls ids that every template takes, and results those of their calls.

    A result without an id, as Ollama's clients send it, answers the first call that is open.
    """
    found: list[Message] = []
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
            asked = answered if answered in open_ else next(iter(open_), answered)
            answered = open_.pop(asked, asked)
        found.append(replace(message, calls=tuple(calls), call_id=answered))
    return found


def _openai(message: Message, content: str, marked: Callable[[str], str]) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.calls:
        made["tool_calls"] = _mapped(_calls(message), marked)
    if message.role == "tool":
        made["tool_call_id"] = message.call_id
    return made


def _calls(message: Message) -> list[Any]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.calls
    ]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with all texts changed, names of properties among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in value.items()}
    return [_mapped(each, change) for each in value] if isinstance(value, list) else value


def _texts(value: Any) -> list[str]:
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found
