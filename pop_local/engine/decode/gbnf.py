"""GBNF of JSON schemas, by llama_cpp's converter, which is mended as this is imported."""

import json
import re
from collections.abc import Callable, Iterable
from os.path import commonprefix
from types import SimpleNamespace
from typing import Any

from llama_cpp import llama_grammar

from pop_local.engine.decode.schema import prepared

_upstream: Any = llama_grammar
# A character of a JSON string (RFC 8259).
_PLAIN = r'[^"\\\x00-\x1F]'
_ESCAPED = r'"\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})'


def gbnf_of(schema: Any) -> str:
    """Write the grammar of a schema's JSON texts; raises whatever what is no schema leads to."""
    made = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    made.visit(made.resolve_refs(prepared(schema), "here"), "")
    return str(made.format_grammar())


class _Converter(_upstream.SchemaConverter):  # type: ignore[misc]  # not typed
    def visit(self, schema: Any, name: str) -> str:
        if "enum" not in schema:
            return str(super().visit(schema, name))
        rule = _one_of(dict.fromkeys(map(_written, schema["enum"])), self._format_literal)
        is_reserved = name in _upstream.RESERVED_NAMES
        return str(self._add_rule(f"{name}-" if is_reserved else name or "root", rule))


def _one_of(texts: Iterable[str], literal: Callable[[str], str]) -> str:
    """GBNF for one of the texts, which are not the same: what several begin with stands once.

    llama.cpp tries each alternative on each token of the vocabulary.
    """
    by_first: dict[str, list[str]] = {}
    for text in texts:
        by_first.setdefault(text[0], []).append(text)
    found = []
    for several in by_first.values():
        begun = commonprefix(several)  # noqa: RUF071 (these are no paths)
        rest = [text[len(begun) :] for text in several if text != begun]
        is_whole = "?" if begun in several else ""
        found.append(literal(begun) + (f" ({_one_of(rest, literal)}){is_whole}" if rest else ""))
    return " | ".join(found)


def _repeated(
    item: str,
    n_min: int,
    n_max: int | None,
    separator_rule: str = "",
    item_rule_is_literal: bool = False,
) -> str:
    """GBNF for so many items, by its own {n_min,n_max}; called with upstream's names."""
    if n_max is not None and n_max < n_min:
        raise ValueError(f"at least {n_min} and at most {n_max}: there is nothing like it")
    if n_max == 0:
        return ""
    if not separator_rule:
        return f"{item}{{{n_min},{'' if n_max is None else n_max}}}"
    most = "" if n_max is None else n_max - 1
    more = f"({separator_rule} {item}){{{max(0, n_min - 1)},{most}}}"
    return f"{item} {more}" if n_min else f"({item} {more})?"


def _written(value: Any) -> str:
    """JSON as a model would write it: \\u00e9 for é is not what it has learned."""
    return json.dumps(value, ensure_ascii=False)


# Upstream's strings hold raw line ends, its literals do not escape backslashes, its repetitions
# nest a bracket for each, and a property integral_part takes the place of a rule of its own.
_upstream.json = SimpleNamespace(dumps=_written)
_upstream.PRIMITIVE_RULES["char"] = _upstream.BuiltinRule(f"{_PLAIN} | {_ESCAPED}", [])
_upstream.DOT = _PLAIN
_upstream.GRAMMAR_LITERAL_ESCAPE_RE = re.compile(r'[\r\n"\\]')
_upstream.GRAMMAR_LITERAL_ESCAPES["\\"] = "\\\\"
_upstream._build_repetition = _repeated
_upstream.RESERVED_NAMES |= {name.replace("-", "_") for name in _upstream.RESERVED_NAMES}
