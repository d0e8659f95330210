"""JSON schemas: the values that their grammars accept, token by token."""

import json
from functools import partial
from typing import Any

import pytest

from pop_local.engine.decode import grammar
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.grammar_mask import Constraint
from support.calls import opened
from support.child_limits import call_limit
from support.grammars import accepts, require_cheap


class Raw(str):
    """An answer's text, which may be invalid JSON."""


@pytest.fixture(scope="module")
def trie(pop_file):
    with opened(pop_file) as model:
        yield model.engine.token_tries.get()


def check(trie: Any, schema: Any, right: list[Any], wrong: list[Any]) -> None:
    grammar = Grammar.of_schema(schema)

    def is_accepted(value: Any) -> bool:
        text = value if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)
        return accepts(trie, grammar, text)

    assert [value for value in right if not is_accepted(value)] == []
    assert [value for value in wrong if is_accepted(value)] == []


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def chain_of_references(n: int) -> dict[str, Any]:
    links = {f"a{i}": an_object(x={"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]}) for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{n}": {}}}


STRING = {"type": "string"}
ADDRESS = an_object(street=STRING)
VALUES = [{"a": [1]}, [None, {}], "a", 1.5, True, None]
NESTED: dict[str, Any] = {"const": 1}
for _ in range(30):  # each type reads only its keywords, so the size does not double per level
    NESTED = {
        "type": ["array", "null"],
        "items": {**an_object(a=NESTED), "type": ["object", "string"]},
    }
ACCEPTED: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "list of types": (
        {"type": ["string", "null"], "enum": ["F", "C", None]},
        ["F", None],
        ["Kelvin", 5],
    ),
    "nested lists of types": (NESTED, [None, [{"a": None}, "b"]], [1, [{"b": 1}]]),
    "enum of another type": (
        {"type": "number", "enum": ["F", 1, 1.5, True]},
        [1, 1.5],
        ["F", True],
    ),
    "letters outside ASCII": (
        an_object(größe={"enum": ["männlich", "ärztlich"]}),
        [{"größe": "männlich"}],
        [{"größe": "a"}, {"grösse": "männlich"}],
    ),
    "allOf with a reference": (
        {**STRING, "allOf": [{"$ref": "#/$defs/c"}], "$defs": {"c": {"enum": ["red"]}}},
        ["red"],
        [{}, "blue"],
    ),
    "required without a schema": (
        {**ADDRESS, "anyOf": [{"required": ["a"]}, {"required": ["street"]}]},
        [{"street": "s", "a": 5}, {"street": "s"}],
        [{"a": 5}],
    ),
    "empty": ({}, VALUES, [Raw('"\n"')]),
    "name of llguidance's rule": (
        an_object(integral_part={"const": "x"}, n={"type": "number"}),
        [{"integral_part": "x", "n": 12.5}],
        [],
    ),
    "definition and property of one name": (
        an_object(
            status={"type": "object", "properties": {"a": STRING}},
            other={"$ref": "#/definitions/status"},
        )
        | {"definitions": {"status": {"enum": ["on", "off"]}}},
        [{"status": {"a": "on"}, "other": "off"}],
        [{"status": "on", "other": "off"}, {"status": {"a": "on"}, "other": {}}],
    ),
    "OpenAPI's exclusive minimum": (
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 9},
        [5],
        ["a"],
    ),
    "long strings": (
        an_object(**{name: {**STRING, "maxLength": 255} for name in "abcdefgh"}),
        [dict.fromkeys("abcdefgh", "x" * 255)],
        [dict.fromkeys("abcdefgh", "x" * 256)],
    ),
    "pattern of any character": (
        {**STRING, "pattern": "."},
        ["a"],
        [Raw(f'"{raw}"') for raw in ('"', "\n", "\\")],
    ),
    "named properties next to others": (
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": STRING},
        [{}, {"a": 1}, {"b": "y"}],
        [{"a": "x"}, Raw(r'{"\u0061": "x"}')],
    ),
    "a client's options for llguidance": (
        {"x-guidance": {"key_separator": "=", "zzz": 1}},
        [{"a": 1}],
        [],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_grammar_accepts_only_values_of_the_schema(trie, name):
    check(trie, *ACCEPTED[name])


@pytest.mark.parametrize("name", ["Tree_Node", "value", "shared0", "string", "a/b~c d"])
def test_definition_may_have_any_name(trie, name):
    escaped = name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")
    reference = {"$ref": f"#/$defs/{escaped}"}
    node = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": reference},
        "required": ["value"],
    }
    two = {"value": 1, "next": {"value": 2}}
    schema = {**an_object(shared0={"const": 3}, value=reference), "$defs": {name: node}}
    check(trie, schema, [{"shared0": 3, "value": two}], [{"shared0": 3, "value": 1}])


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", "2024-02-29", ["2023-02-29", "1900-02-29", "2024-13-01", "0000-01-01", "1-2-3"]),
        ("date-time", "2024-02-29T10:00:00Z", ["2023-02-29T10:00:00Z", "2024-02-29T10:00:60Z"]),
        ("time", "10:00:00+01:00", ["24:00:00Z", "10:00:60Z", "10:00"]),
    ],
)
def test_enforces_formats(trie, name, right, wrong):
    check(trie, {"type": ["string", "null"], "format": name}, [right, None], wrong)


@pytest.mark.parametrize(
    ("schema", "ignored"),
    [
        (ADDRESS, ()),
        ({**STRING, "title": "A", "default": 1, "examples": ["a"], "deprecated": True}, ()),
        ({**STRING, "format": "password"}, ("format password",)),
        ({"type": "array", "uniqueItems": True, "contains": {}}, ("contains", "uniqueItems")),
        ({"allOf": [STRING, {"not": {"const": "a"}}]}, ("not",)),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ("oneOf",)),
        ({"type": "object", "minProperties": 2}, ("minProperties",)),
        ({"properties": {"a": {}}, "maxProperties": 3}, ("minProperties", "maxProperties")),
        (an_object(minProperties={"const": {"minProperties": 5}}), ()),
    ],
)
def test_reports_ignored_keywords(schema, ignored):
    assert Grammar.of_schema(schema).ignored == ignored


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (False, "false"),
        ([], "not an object"),
        ({1, 2}, "serializable"),
        ({"enum": []}, "empty"),
        ({"anyOf": []}, "empty"),
        ({"type": "date"}, "Invalid type: date"),
        ({"type": 5}, "type must be"),
        ({"type": []}, "empty"),
        ({"type": "object", "properties": 5}, "properties"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#anchor"}, "anchor"),
        ({"$ref": "other.json"}, "does not fetch"),
        ({"$ref": "https://example.org/schema.json"}, "does not fetch"),
        ({"allOf": [{"$ref": "#"}, ADDRESS]}, "circular"),
        ({"allOf": [STRING, {"type": "integer"}]}, "incompatible types"),
        ({"allOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, "Unsatisfiable"),
        ({"allOf": [{"const": 1}, {"const": True}]}, "incompatible types"),
        ({"allOf": [{**STRING, "pattern": "^a$"}, {"pattern": "^b$"}]}, "empty"),
        ({"allOf": [{**ADDRESS, "additionalProperties": False}, an_object(a={})]}, "unsatisfiable"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "unsatisfiable"),
        ({"patternProperties": {"^a": STRING, "b$": STRING}}, "patternProperty"),
        *(
            ({**STRING, "pattern": text}, "pattern")
            for text in (r"^\b$", "^(?!a)b$", r"(a)\1", "[")
        ),
        ({"const": 2**53 + 1}, "const"),
        (an_object(a={"type": "integer", "maximum": 2**60}), "maximum"),
        ({"enum": [["a\x01"]]}, "enum"),
    ],
)
def test_rejects_inexpressible_schema(schema, reason):
    with pytest.raises(GrammarError, match=f"JSON schema.*{reason}"):
        Grammar.of_schema(schema)


def test_rejects_self_referencing_definition(trie):
    grammar = Grammar.of_schema({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}})
    with pytest.raises(GrammarError, match="no token"):
        Constraint(trie, grammar).allowed()


@pytest.fixture(scope="module")
def in_a_hurry():
    with call_limit(0.5, *grammar._children.queue):
        yield


@pytest.mark.parametrize(
    "schema",
    [
        {**STRING, "pattern": "^a{400000000}$"},
        {"items": {"pattern": "^(a{2}){0,400000000}$"}},
        {**STRING, "pattern": "(.*a){12}.{18}b"},
        {**STRING, "pattern": "(" * 100_000},
        {**STRING, "minLength": 10**9},
        {"type": "array", "items": {**STRING, "maxLength": 10**9}, "maxItems": 10**9},
        {"type": "integer", "multipleOf": 999_983},
        {"type": "object", "properties": {f"p{n}": STRING for n in range(10_000)}},
        {"enum": [f"value {n}" for n in range(10_000)]},
        {"allOf": [{"anyOf": [an_object(**{f"{n}{m}": {}}) for m in range(11)]} for n in range(5)]},
        chain_of_references(1_000),
        json.loads('{"items": ' * 200 + "{}" + "}" * 200),
    ],
    ids=range(12),
)
def test_large_schema_is_compiled_in_seconds(in_a_hurry, trie, schema):
    require_cheap(trie, partial(Grammar.of_schema, schema))
