"""Parse tool calls that some models write as fenced JSON or Python at the end of an answer."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from pop_local.engine.tools.tool import Tool

_FENCE = re.compile(r"(?:\A\s*|(?<=\n))```\w*\s*\n\s*((?:(?!```).)*)(?:```\s*|\Z)", re.DOTALL)


def last_calls(text: str, tools: Sequence[Tool]) -> tuple[tuple[tuple[str, str], ...], str]:
    """Return (name, JSON arguments) pairs for the calls in the code fence that ends an answer.

    If the answer seems to call a tool but contains no valid call, the second return value states
    the reason. Calls must name known tools and use only arguments that the tools' schemas allow.
    """
    known = {tool.name: tool.parameters for tool in tools}
    either = "|".join(map(re.escape, known))
    named = re.search(rf"""(?:["'<=]|\b)({either})["'(>]""", text)
    if named is None:
        return (), ""
    *_, last = (None, *_FENCE.finditer(text))
    if last is None or last.end() < len(text):
        return (), f'the call to "{named[1]}" has an unknown format or is followed by text'
    try:
        calls = [(name, json.dumps(given), {*given}) for name, given in _calls(last[1])]
    except (AttributeError, KeyError, RecursionError, SyntaxError, TypeError, ValueError):
        return (), f'the call to "{named[1]}" is neither valid JSON nor a valid Python call'
    for name, _, given in calls:
        required, allowed = (known.get(name, {}).get(key) for key in ("required", "properties"))
        if name not in known or not {*(required or ())} <= given <= {*(allowed or given)}:
            return (), f"the code calls {named[1]} with invalid arguments or calls an unknown tool"
    return tuple((name, arguments) for name, arguments, _ in calls), ""


def _calls(code: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) pairs. Raises an error unless the code contains only calls."""
    if code.startswith("{"):
        value = json.loads(code)
        return [(value["name"], {**value.get("arguments", value.get("parameters"))})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning would print the model's text
        lines = ast.parse(code).body
    calls: list[Any] = [line.value if isinstance(line, ast.Expr) else None for line in lines]
    if any(call.args or any(k.arg is None for k in call.keywords) for call in calls):
        raise ValueError("pass every argument by keyword")
    literal = ast.literal_eval
    return [(ast.unparse(c.func), {k.arg: literal(k.value) for k in c.keywords}) for c in calls]
