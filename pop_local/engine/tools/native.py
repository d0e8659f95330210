"""Render and parse tool calls in the template's format, using llama.cpp's chat code."""

from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from pop_local.engine.limited.process import KeptProcess
from pop_local.engine.prompt.templates import LIMIT_BYTES, LIMIT_S, Template
from pop_local.engine.tools import chat_child

_UNKNOWN = "unknown key"  # the error of a child process that has not cached the format
_SEVERAL = "root ::= tool-call | tool-calls"


@dataclass(frozen=True)
class Rendered:
    """A prompt and the format of the answer, as returned by pop-chat.cpp.

    `takes_tools`: whether the template renders tools. `grammar`: a GBNF grammar that applies after
    one of the `triggers` matches. `shown`: the special tokens in the format's text.
    """

    prompt: str
    takes_tools: bool
    grammar: str
    triggers: list[dict[str, str]]
    shown: list[str]
    stops: list[str]
    format: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """A parsed answer, either complete or partial. `calls`: (name, arguments) pairs."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


_chat = KeptProcess(
    chat_child.ChatFormatter,
    limit_s=LIMIT_S,
    limit_bytes=LIMIT_BYTES,
    task="processing tool calls",
    hint="send fewer or simpler tools",
)


def render(
    template: Template,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    *,
    several: bool,
) -> Rendered:
    """Render messages and tools, both in OpenAI's format.

    Raises ValueError if the template rejects the messages, or PopError if limits are exceeded.
    """
    request = {
        "template": template.source,
        "bos": template.bos,
        "eos": template.eos,
        "messages": messages,
        "tools": tools,
        "parallel": several,
        "tool_choice": "auto",
    }
    rendered = _chat.call("render", request)
    grammar, form = rendered["grammar"], rendered["format"]
    if not grammar:  # without triggers, `auto` has no grammar
        grammar = _chat.call("render", {**request, "tool_choice": "required"})["grammar"]
        grammar = grammar and _with_root(grammar, "tool-call")
    elif _SEVERAL in grammar:  # this root also matches white space alone
        grammar = _with_root(grammar, "tool-call (space tool-call)*" if several else "tool-call")
    form = {**form, "key": sha256(repr(form).encode()).hexdigest()}
    rendered |= {"grammar": grammar, "format": form}
    return Rendered(**{field.name: rendered[field.name] for field in fields(Rendered)})


def _with_root(grammar: str, rule: str) -> str:
    rules = [line for line in grammar.splitlines() if not line.startswith("root ::=")]
    return "\n".join([*rules, f"root ::= {rule}"])


def parse(form: dict[str, Any], text: str, *, partial: bool) -> Parsed:
    """Parse an answer.

    Raises ValueError if the answer does not match `form`, or PopError if limits are exceeded.
    """
    request = {"key": form["key"], "text": text, "partial": partial}
    try:
        parsed = _chat.call("parse", request)
    except ValueError as error:
        if str(error) != _UNKNOWN:
            raise
        parsed = _chat.call("parse", {**request, "format": form})
    calls = tuple((call["name"], call["arguments"]) for call in parsed["calls"])
    return Parsed(parsed["content"], parsed["reasoning"], calls)
