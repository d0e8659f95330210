"""Build grammars for llguidance from JSON schemas and GBNF."""

import json
import queue
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from pop_base.errors import PopError
from pop_local.engine.decode import grammar_child
from pop_local.engine.limited.process import BeyondLimitsError, KeptProcess, RefusedError

LIMIT_S = 3
LIMIT_BYTES = 512 * 2**20
# Maximum number of grammars that compile concurrently, each in a separate child process.
N_COMPILING = 2
_MAX_CHARACTERS = 2**20
_MAX_MESSAGE = 300
# With no_forcing, the model chooses every token, so `a{400000000}` is not expanded in advance.
_HEAD = '%llguidance {"no_forcing": true}\n'
_OPTIONS: Any = {
    # With unlimited white space, an answer may never end.
    "whitespace_pattern": r" |\n{1,2}[ \t]{0,20}",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    # With \u escapes, a model could repeat a named property with any value.
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": True,
    "lenient": True,
}
# _NAMED: keywords that map names to schemas. _DATA: keywords with plain values.
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_VALUES = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_DATA = {*_VALUES, "default", "examples", "example"}
# llguidance compares larger integers as floating-point numbers.
_MAX_INTEGER = 2**53
# Characters that JSON writes with \u, which _OPTIONS forbids.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
# llguidance's date formats ignore leap years, and allow the year 0 and seconds beyond 59.
_DAY = (
    r"\d{4}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
)
_STRICTER = {
    "date": [f"^(?:{_DAY})", "^[0-9]*[1-9]"],
    "date-time": [f"^(?:{_DAY})", "^[0-9]{0,3}[1-9]", ":[0-9]{2}:[0-5]"],
    "time": [":[0-9]{2}:[0-5]"],
}
# The most recently used child is taken first, so that sequential calls start only one.
_children: queue.LifoQueue[KeptProcess] = queue.LifoQueue()
for _ in range(N_COMPILING):
    _children.put(
        KeptProcess(grammar_child.GrammarCompiler, limit_s=LIMIT_S, limit_bytes=LIMIT_BYTES)
    )


@dataclass(frozen=True)
class JsonRule:
    """A JSON schema translated into a Lark rule. `ignored`: schema keywords that have no effect."""

    text: str
    ignored: tuple[str, ...]


class GrammarError(PopError):
    """Error raised if a grammar or schema is unusable, or if a grammar allows no next token."""


@dataclass(frozen=True)
class Grammar:
    """A grammar that compiles within the time and memory limits.

    `text`: the grammar in llguidance's format. `ignored`: JSON Schema keywords that have no effect.
    """

    text: str
    ignored: tuple[str, ...] = ()

    @classmethod
    def of_schema(cls, schema: Any) -> "Grammar":
        """Return a grammar for JSON that matches a schema (draft 2020-12).

        The schema determines the order of properties. Raises GrammarError if the schema is invalid,
        unsatisfiable, or unsupported.
        """
        rule = json_rule(schema)
        return cls.of_lark(f"start: {rule.text}", "the JSON schema", rule.ignored)

    @classmethod
    def of_lark(cls, lark: str, noun: str, ignored: Sequence[str] = ()) -> "Grammar":
        """Compile a Lark grammar in the child process. `noun`: the grammar's name in messages.

        Raises GrammarError if the grammar is invalid or exceeds the limits.
        """
        text = LLMatcher.grammar_from_lark(f"{_HEAD}{lark}")
        _require_size(text, noun)
        try:
            warnings = _called(noun, "warnings", text)
        except RefusedError as error:
            raise GrammarError(f"{noun} is not valid: {short(error.message)}") from error
        keywords = [*ignored, *(name for warning in warnings for name in _named(warning))]
        return cls(text, tuple(dict.fromkeys(keywords)))

    @classmethod
    def of_gbnf(cls, gbnf: str, instead: Mapping[str, "JsonRule"] | None = None) -> "Grammar":
        """Return a grammar for text that matches the `root` rule of a GBNF grammar.

        `instead` maps rule names to replacement schemas. Raises GrammarError for invalid GBNF.
        """
        rules = instead or {}
        noun = "a tool's schema" if rules else "the grammar"
        if not rules:  # the template's grammar also contains the rules that are replaced
            _require_size(gbnf, noun)
        texts = {name: rule.text for name, rule in rules.items()}
        try:
            text = _called(noun, "lark", gbnf, texts)
        except RefusedError as error:
            raise GrammarError(
                f"the grammar is not valid GBNF: {error.message[:_MAX_MESSAGE]}",
                "write each rule as NAME ::= ... and include a rule named root",
            ) from error
        return cls.of_lark(text, noun, [name for rule in rules.values() for name in rule.ignored])


def _called(noun: str, method: str, *arguments: Any) -> Any:
    """Call a GrammarCompiler method. Raises GrammarError if the call exceeds a limit."""
    child = _children.get()
    try:
        return child.call(method, *arguments)
    except BeyondLimitsError as error:
        raise GrammarError(f"{noun} exceeds the limit ({child.limits})", "simplify it") from error
    finally:
        _children.put(child)


def _require_size(text: str, noun: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise GrammarError(f"{noun} is too large: {len(text):,} characters")


def json_rule(schema: Any) -> JsonRule:
    """Translate a JSON schema into Lark. Raises GrammarError if the schema is invalid."""
    try:
        # Copy the schema with JSON types only, because _prepared changes its argument.
        copy = {"allOf": [schema]} if isinstance(schema, bool) else schema
        copy = json.loads(json.dumps(copy))
        if not isinstance(copy, dict):
            raise ValueError("the schema is not an object")
        ignored = [name for part in _schemas(copy) for name in _prepared(part)]
        text = f"%json {json.dumps({**copy, 'x-guidance': _OPTIONS})}"
    except (RecursionError, TypeError, ValueError) as error:
        raise GrammarError(f"the JSON schema is not valid: {error}") from error
    return JsonRule(text, tuple(ignored))


def unchecked(lark: str) -> Grammar:
    """Return a grammar without compiling it. The caller must have checked the grammar's parts."""
    return Grammar(LLMatcher.grammar_from_lark(f"{_HEAD}{lark}"))


def short(message: str) -> str:
    """Rewrite an llguidance message as one line that uses JSON Schema's terms."""
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", message)
    text = re.split(r"\n<|\n +\d+ \| ", text)[0]
    return " ".join(text.split()).replace("regex", "pattern")[:_MAX_MESSAGE]


def _named(warning: str) -> list[str]:
    """Return the keywords named in an llguidance warning."""
    head, _, tail = warning.partition(": ")
    if head == "Unimplemented keys":
        return [str(key) for key in json.loads(tail)]
    if head == "Unknown format":
        return [f"format {tail}"]
    return ["minProperties", "maxProperties"] if head.startswith("min/max") else [head.split()[0]]


def _schemas(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, list):
        for item in part:
            yield from _schemas(item)
    elif isinstance(part, dict):
        yield part
        for name, below in part.items():
            if name in _NAMED and isinstance(below, dict):
                yield from _schemas([*below.values()])
            elif name not in _DATA:
                yield from _schemas(below)


def _prepared(schema: dict[str, Any]) -> list[str]:
    """Add constraints that llguidance lacks and return the keywords that it only partly enforces.

    Raises GrammarError for values that llguidance would misread.
    """
    for name in _VALUES:
        for value in _leaves(schema.get(name)):
            if isinstance(value, int) and abs(value) > _MAX_INTEGER:
                raise GrammarError(f"the JSON schema's {name} is outside the range ±2^53: {value}")
            if isinstance(value, str) and _UNWRITABLE.search(value):
                raise GrammarError(
                    f"the JSON schema's {name} contains control characters: {value!r}"
                )
    patterns = _STRICTER.get(str(schema.get("format")), [])
    if patterns and isinstance(schema.setdefault("allOf", []), list):
        schema["allOf"] += [{"pattern": pattern} for pattern in patterns]
    # llguidance counts a repeated name twice.
    n_least = schema.get("minProperties")
    return ["minProperties"] if isinstance(n_least, int) and n_least > 1 else []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
