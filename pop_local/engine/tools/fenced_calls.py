"""Tool calls as JSON or Python in a fence, with which some models end their answers."""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from pop_local.engine.tools.native import Parsed
from pop_local.engine.tools.tool import Tool

_BEGUN = re.compile(r"(?:\A\s*|\n)`{1,3}\w*\s*\Z")
_FENCE = re.compile(r"(?:\A\s*|(?<=\n))```\w*\s*\n\s*((?:(?!```).)*)(?:```\s*|\Z)", re.DOTALL)
_JSON = '{"name"'


def may_end(text: str, names: Iterable[str]) -> bool:
    """Return whether an answer that starts with `text` may end with its last fence as a call."""
    match = _last_fence(text)
    if match is None:
        return _BEGUN.search(text) is not None
    code = "".join(match[1].split())
    openings = [f"{name}(" for name in names]
    if match.start():  # JSON at an answer's start has a grammar and is streamed (text_form)
        openings.append(_JSON)
    return any(code.startswith(each[: len(code)]) for each in openings)


def parse(text: str, tools: Sequence[Tool]) -> tuple[Parsed, str]:
    """Parse the calls in an answer's last fence.

    Returns also the reason if the answer names a tool as a call does, but contains no call. All
    calls must be of known tools, with keywords that the tools' parameters allow.
    """
    known = {tool.name: tool.parameters for tool in tools}
    either = "|".join(map(re.escape, known))
    named = re.search(rf"""(?:["'<=]|\b)({either})["'(>]""", text)
    if named is None:
        return Parsed(text), ""
    match = _last_fence(text)
    if match is None:
        return Parsed(text), f"{named[1]} is not in a known form, or text follows it"
    try:
        calls = [(name, json.dumps(given), given) for name, given in _calls(match[1])]
    except (AttributeError, KeyError, RecursionError, SyntaxError, TypeError, ValueError):
        return Parsed(text), f"{named[1]}'s fence is neither JSON nor calls with literals"
    for name, _, given in calls:
        required, allowed = (known.get(name, {}).get(key) for key in ("required", "properties"))
        if name not in known or not {*(required or ())} <= {*given} <= {*(allowed or given)}:
            return Parsed(text), f"{named[1]}'s fence has an unknown name or wrong arguments"
    content = text[: match.start()].rstrip()
    return Parsed(content, "", tuple((name, arguments) for name, arguments, _ in calls)), ""


def _last_fence(text: str) -> re.Match[str] | None:
    """Return the match for the fence at the end of a text, even if the fence is still open."""
    *_, last = (None, *_FENCE.finditer(text))
    return last if last is not None and last.end() == len(text) else None


def _calls(code: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and arguments. Raises one of several errors if the code contains other text."""
    if code.startswith("{"):
        value = json.loads(code)
        return [(value["name"], {**value.get("arguments", value.get("parameters"))})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning would print the model's text
        lines = ast.parse(code).body
    calls: list[Any] = [line.value if isinstance(line, ast.Expr) else None for line in lines]
    if any(call.args for call in calls):
        raise ValueError("positional arguments do not name parameters")
    literal = ast.literal_eval
    return [(ast.unparse(c.func), {k.arg: literal(k.value) for k in c.keywords}) for c in calls]
