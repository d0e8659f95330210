"""JSON schemas: the values that their grammars accept, token by token."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from pop_local.engine.decode import grammar
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.engine.decode.grammar_mask import Constraint
from support.calls import N_VOCAB, opened
from support.child_limits import call_limit
from support.synthetic import make_gguf

Accepts = Callable[[Any, Any], bool]


class Raw(str):
    """An answer's text, which may be invalid JSON."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(make_gguf(tmp_path_factory.mktemp("schema") / "tiny.gguf", "llama")) as model:
        yield model


@pytest.fixture(scope="module")
def accepts(model):
    """Return a function that checks if a schema's grammar accepts a value, byte by byte."""
    trie = model.engine.token_tries.get()
    tokens = {trie.decode_bytes([token]): token for token in range(N_VOCAB)}

    def accepts(schema: Any, value: Any) -> bool:
        constraint = Constraint(trie, Grammar.of_schema(schema))
        text = value if isinstance(value, Raw) else json.dumps(value, ensure_ascii=False)
        for byte in text.encode():
            if tokens[bytes([byte])] not in constraint.allowed():
                return False
            constraint.accept(tokens[bytes([byte])])
        return trie.eos_tokens[0] in constraint.allowed()

    return accepts


def check(accepts: Accepts, schema: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not accepts(schema, value)] == []
    assert [value for value in wrong if accepts(schema, value)] == []


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def chain_of_references(n: int) -> dict[str, Any]:
    links = {f"a{i}": an_object(x={"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]}) for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{n}": {}}}


STRING = {"type": "string"}
ADDRESS = an_object(street=STRING)
VALUES = [{"a": [1]}, [None, {}], "a", 1.5, True, None]


def test_a_list_of_types_keeps_the_other_keywords(accepts):
    unit = {"type": ["string", "null"], "enum": ["F", "C", None]}
    check(accepts, unit, ["F", None], ["Kelvin", 5])
    check(accepts, {**ADDRESS, "type": ["object", "null"]}, [{"street": "a"}, None], [{}, "a"])
    short = {"type": ["string", "integer"], "maxLength": 2}
    check(accepts, short, ["ab", 5], ["abc", None])
    nested: dict[str, Any] = {"const": 1}
    for _ in range(30):  # each type reads only its keywords, so the size does not double per level
        nested = {
            "type": ["array", "null"],
            "items": {**an_object(a=nested), "type": ["object", "string"]},
        }
    check(accepts, nested, [None, [{"a": None}, "b"]], [1, [{"b": 1}]])


def test_values_may_share_a_prefix(accepts):
    right = ["a", "ab", "abc", "b", "", 1, 12, -1, {"a": 1}, "C:\\x", "a"]
    check(accepts, {"enum": right}, right, ["c", "abcd", 2, 123, {"a": 2}, "C:"])


def test_non_ascii_letters_are_not_escaped(accepts):
    schema = an_object(größe={"enum": ["männlich", "ärztlich"]})
    check(accepts, schema, [{"größe": "männlich"}], [{"größe": "a"}, {"grösse": "männlich"}])


def test_all_of_merges_schemas(accepts):
    colour = {"enum": ["red", "green"]}
    for schema in (
        {"allOf": [colour]},
        {"type": "string", "allOf": [{"$ref": "#/$defs/c"}], "$defs": {"c": colour}},
        {"allOf": [colour, {"description": "of the car"}], "default": "red"},
    ):
        check(accepts, schema, ["red"], [{}, "blue"])
    both = {"allOf": [ADDRESS, {"properties": {"town": STRING}}]}
    check(accepts, both, [{"street": "a", "town": "b"}, {"street": "a"}], [{}, {"town": "b"}])
    beside = {**ADDRESS, "anyOf": [an_object(a={"const": 1}), {"properties": {"b": {"const": 2}}}]}
    check(accepts, beside, [{"street": "s", "a": 1}, {"street": "s", "b": 2}], [{"a": 1}])
    several = {"allOf": [ADDRESS, {"anyOf": [an_object(a={"const": 1}), an_object(b=STRING)]}]}
    check(accepts, several, [{"street": "s", "a": 1}, {"street": "s", "b": "x"}], [{"a": 1}])
    check(accepts, {"allOf": [STRING, colour]}, ["red"], ["blue"])


NEEDS_A, NEEDS_B = an_object(a={"const": 1}), an_object(b={"const": 2})


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [ADDRESS, {"anyOf": [NEEDS_A, NEEDS_B]}]},
        {"allOf": [ADDRESS], "anyOf": [NEEDS_A, NEEDS_B]},
        {"allOf": [{**ADDRESS, "oneOf": [NEEDS_A, NEEDS_B]}]},
        {"allOf": [{**ADDRESS, "oneOf": [NEEDS_A, NEEDS_B]}, {"type": "object"}]},
        {**ADDRESS, "anyOf": [{"properties": {}, "oneOf": [NEEDS_A, NEEDS_B]}]},
        {"$ref": "#/$defs/A", "anyOf": [NEEDS_A, NEEDS_B], "$defs": {"A": ADDRESS}},
    ],
)
def test_all_of_enforces_each_schema(accepts, schema):
    right = [{"street": "s", "a": 1}, {"street": "s", "b": 2}]
    check(accepts, schema, right, [{"street": "s"}, {"a": 1}, {"street": "s", "a": 2}])


def test_two_schemas_of_one_property_are_merged(accepts):
    kinds = [an_object(kind={"const": kind}) for kind in ("cat", "dog")]
    base = an_object(kind=STRING)
    for schema in ({**base, "allOf": kinds[:1]}, {"allOf": [*kinds[:1], base]}):
        check(accepts, schema, [{"kind": "cat"}], [{"kind": "dog"}, {}])
    one_of = {**base, "oneOf": kinds}
    check(accepts, one_of, [{"kind": "cat"}, {"kind": "dog"}], [{"kind": "cow"}])
    few = {**an_object(kind={"enum": ["cow", "cat"]}), "additionalProperties": False}
    check(accepts, {"allOf": [few, base]}, [{"kind": "cat"}], [{"kind": "dog"}])
    integers = {"additionalProperties": {"type": "integer"}}
    a_number = {"allOf": [integers, an_object(n={"type": "number"}), {"required": ["m"]}]}
    check(accepts, a_number, [{"n": 1, "m": 2}], [{"n": 1.5, "m": 2}, {"n": 1, "m": "a"}])


def test_keywords_next_to_a_reference_are_enforced(accepts):
    schema = {"$ref": "#/$defs/A", "maxLength": 2, "$defs": {"A": {**STRING, "minLength": 1}}}
    check(accepts, schema, ["a", "ab"], ["", "abc"])
    schema["$defs"] = {"A": {"type": ["string", "null"], "maxLength": 5}}
    check(accepts, schema, ["ab", None], ["abc"])
    schema["$defs"] = {"A": {"enum": ["a", "abc"]}}
    check(accepts, schema, ["a"], ["abc"])


def test_required_properties_without_a_schema_are_present(accepts):
    schema = {**ADDRESS, "anyOf": [{"required": ["a"]}, {"required": ["street"]}]}
    check(accepts, schema, [{"street": "s", "a": 5}, {"street": "s"}], [{"a": 5}])
    check(accepts, {"type": "object", "required": ["a"]}, [{"a": VALUES}], [{}])
    check(accepts, {"type": "object", "required": []}, [{}, {"a": 1}], [1])


def test_an_enum_has_values_of_its_type(accepts):
    check(accepts, {"type": ["string", "null"], "enum": ["F"]}, ["F"], [None])
    check(accepts, {"type": "number", "enum": ["F", 1, 1.5, True]}, [1, 1.5], ["F", True])


def test_a_schema_without_type_allows_any_value(accepts):
    a_list = {"type": "array", "items": {}}
    check(accepts, a_list, [VALUES], [{}])
    check(accepts, {"type": "array", "maxItems": 2}, [[1, "a"], []], [[1, 2, 3]])
    check(accepts, an_object(a={"title": "A"}), [{"a": value} for value in VALUES], [{}])
    free = {"type": "object", "additionalProperties": True}
    check(accepts, free, [{"a": value} for value in VALUES], ["a"])
    check(accepts, {**free, **an_object(a=True)}, [{"a": 1, "b": 2}], [{"b": 2}])
    check(accepts, {"title": "Anything"}, VALUES, [])
    check(accepts, {}, VALUES, [Raw('"\n"')])
    check(accepts, True, VALUES, [])


NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Tree_Node"}},
    "required": ["value"],
}


@pytest.mark.parametrize("name", ["Tree_Node", "value", "next", "shared0", "string", "a/b~c d"])
def test_a_definition_may_have_any_name(accepts, name):
    escaped = name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")
    written = json.dumps(NODE).replace("Tree_Node", escaped)
    root = {"$ref": f"#/$defs/{escaped}", "$defs": {name: json.loads(written)}}
    one, two = {"value": 1}, {"value": 1, "next": {"value": 2}}
    check(accepts, root, [one, two], [{"value": "a"}, {"next": one}, 5])
    within = {
        **an_object(shared0={"const": 3}, value={"$ref": root["$ref"]}),
        "$defs": root["$defs"],
    }
    check(accepts, within, [{"shared0": 3, "value": two}], [{"shared0": 3, "value": 1}])


def test_a_property_and_a_definition_of_one_name(accepts):
    schema = an_object(
        status={"type": "object", "properties": {"a": STRING}},
        other={"$ref": "#/definitions/status"},
    ) | {"definitions": {"status": {"enum": ["on", "off"]}}}
    right = {"status": {"a": "on"}, "other": "off"}
    check(accepts, schema, [right], [{"status": "on", "other": "off"}, {**right, "other": {}}])


def test_a_reference_may_name_the_whole_schema(accepts):
    nested = {"type": "array", "items": {"$ref": "#"}}
    check(accepts, nested, [[], [[], [[]]]], [[1]])


def test_a_property_does_not_become_a_part_of_numbers(accepts):
    schema = an_object(integral_part={"const": "x"}, n={"type": "number"})
    check(accepts, schema, [{"integral_part": "x", "n": 12.5}], [])


@pytest.mark.parametrize(
    ("bounds", "right", "wrong"),
    [
        ({"minimum": 1, "maximum": 12}, [1, 9, 12], [0, 13, 1.5, -1]),
        ({"exclusiveMinimum": -2, "exclusiveMaximum": 1.5}, [-1, 0, 1], [-2, 2]),
        ({"minimum": 1900, "maximum": 2100}, [1900, 1999, 2100], [1, 190, 1899, 2101, 20000]),
        ({"minimum": 1}, [1, 10**6], ["a"]),
        ({"minimum": 0, "maximum": 10**6}, [5, 10**6], ["a"]),
        ({"minimum": 0, "exclusiveMinimum": True, "maximum": 9}, [5], ["a"]),
    ],
)
def test_a_short_range_of_integers_is_enforced(accepts, bounds, right, wrong):
    check(accepts, {"type": "integer", **bounds}, right, wrong)
    check(accepts, {"type": ["integer", "null"], **bounds}, [*right, None], wrong)


def test_equal_ranges_of_integers_are_written_once(accepts):
    names = [f"n{number}" for number in range(12)]
    form = an_object(**{name: {"type": "integer", "minimum": 0, "maximum": 999} for name in names})
    check(accepts, form, [dict.fromkeys(names, 999)], [dict.fromkeys(names, 1000)])


def test_numbers_of_items_and_characters(accepts):
    text = {"type": "string", "minLength": 2, "maxLength": 3}
    check(accepts, text, ["ab", "abc"], ["a", "abcd"])
    check(accepts, {"type": "string", "maxLength": 0}, [""], ["a"])
    check(accepts, {"type": "string", "pattern": "^(ab){2,}c{1,2}$"}, ["ababc"], ["abc", "ababccc"])
    for least, most in ((0, 2), (1, 2), (2, 2), (1, 1), (0, 0), (2, 5), (2, None)):
        schema: dict[str, Any] = {"type": "array", "items": {"const": 1}, "minItems": least}
        schema |= {} if most is None else {"maxItems": most}
        lists = [[1] * n for n in range(7)]
        right = [one for one in lists if least <= len(one) <= (math.inf if most is None else most)]
        check(accepts, schema, right, [one for one in lists if one not in right])


def test_ordinary_limits_are_not_too_large(accepts):
    form = an_object(**{name: {"type": "string", "maxLength": 255} for name in "abcdefgh"})
    check(
        accepts,
        form,
        [dict.fromkeys("abcdefgh", "x" * 255)],
        [dict.fromkeys("abcdefgh", "x" * 256)],
    )
    many = {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000}
    check(accepts, many, [["a", "b"]], ["a"])


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\d{4}-\d{2}$", ["2026-11"], ["2026-1", "a"]),
        (r"^\w+@[\w-]+(?:\.[a-z]+)+$", ["a_1@b-c.co.uk"], ["a@b", "a@bxc"]),
        (r"^\S\D$", ["ab", '"b'], [" b", "a1"]),
        (r"^[^a]{2}$", ["bc", "é-", "\n\n", 'b"'], ["ab", "b"]),
        (r"^[ -~]+$", ["a [b] c~", '"'], ["é"]),
        (r"^[\]\-^]+$", ["]-^"], ["\\", "a"]),
        (r"^yes$|^no$", ["yes", "no"], ["yno", "yeso"]),
        (r"^\(\$[0-9]\)$", ["($5)"], ["5"]),
        (r"^\++?[*?]+a?(?:b)*$", ["+*", "+++?*abb"], ["*", "+"]),
        ("ab+c", ["abc", "xabbcx"], ["ac", ""]),
    ],
)
def test_a_pattern_is_searched_for_and_json_all_the_same(accepts, pattern, right, wrong):
    check(accepts, {"type": "string", "pattern": pattern}, right, wrong)
    for raw in ('"', "\n", "\\"):
        assert not accepts({"type": "string", "pattern": "."}, Raw(f'"{raw}"'))


def test_a_pattern_and_a_length_hold_together(accepts):
    both = {**STRING, "pattern": "^a+$", "maxLength": 2}
    check(accepts, both, ["a", "aa"], ["aaa", ""])


def test_named_properties_keep_their_types_next_to_others(accepts):
    named = {"a": {"type": "integer"}, "é": STRING}
    for others in ({}, {"additionalProperties": True}, {"additionalProperties": STRING}):
        schema = {"type": "object", "properties": named, **others}
        check(accepts, schema, [{}, {"a": 1}, {"é": "x", "b": "y"}, {"b": "y"}], [{"a": "x"}])
    # Escapes of the same name are rejected too.
    check(accepts, schema, [], [Raw(r'{"\u0061": "x"}')])


def test_any_name_may_be_a_property(accepts):
    schema = an_object(**{"": {"type": "integer"}, "$ref": STRING, "properties": {"const": 1}})
    right = {"": 1, "$ref": "a", "properties": 1}
    check(accepts, schema, [right], [{**right, "": "a"}, {**right, "$ref": 1}, {}])


def test_a_tuple_has_its_limits(accepts):
    schema = {"prefixItems": [STRING, {"type": "integer"}], "minItems": 2, "maxItems": 3}
    right = [["a", 1], ["a", 1, None]]
    check(accepts, {"type": "array", **schema}, right, [["a"], [1, "a"], ["a", 1, 2, 3]])
    closed = {"type": "array", **schema, "items": False}
    check(accepts, closed, right[:1], right[1:])


def test_maps_have_their_patterns_and_limits(accepts):
    by_name = {"patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}
    check(accepts, {"type": "object", **by_name}, [{}, {"x1": 1}], [{"x1": "a"}, {"y": 1}])
    few = {"type": "object", "additionalProperties": STRING, "maxProperties": 1}
    check(accepts, few, [{}, {"a": "b"}], [{"a": "b", "c": "d"}, {"a": 1}])
    some = {"type": "object", "properties": {"a": STRING, "b": STRING}, "minProperties": 1}
    check(accepts, {**some, "additionalProperties": False}, [{"a": "x"}, {"b": "x"}], [{}])


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date", "2024-02-29", ["2023-02-29", "1900-02-29", "2024-13-01", "0000-01-01", "1-2-3"]),
        ("date-time", "2024-02-29T10:00:00Z", ["2023-02-29T10:00:00Z", "2024-02-29T10:00:60Z"]),
        ("time", "10:00:00+01:00", ["24:00:00Z", "10:00:60Z", "10:00"]),
        ("email", "a.b@example.org", ["a.b", "a@"]),
        ("ipv4", "127.0.0.1", ["256.0.0.1", "1.2.3"]),
        ("ipv6", "::1", [":1", "g::"]),
        ("uri", "https://example.org/a?b#c", ["a b", "//x"]),
        ("hostname", "example.org", ["-a", "a..b"]),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", ["123e4567"]),
        ("duration", "P1DT2H", ["1D", "P"]),
    ],
)
def test_formats_hold(accepts, name, right, wrong):
    check(accepts, {"type": ["string", "null"], "format": name}, [right, None], wrong)


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
def test_ignored_keywords_are_reported(schema, ignored):
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
        ({"allOf": [{**ADDRESS, "additionalProperties": False}, NEEDS_A]}, "unsatisfiable"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "unsatisfiable"),
        ({"patternProperties": {"^a": STRING, "b$": STRING}}, "patternProperty"),
        *(({**STRING, "pattern": one}, "pattern") for one in (r"^\b$", "^(?!a)b$", r"(a)\1", "[")),
        ({"const": 2**53 + 1}, "const"),
        (an_object(a={"type": "integer", "maximum": 2**60}), "maximum"),
        ({"enum": [["a\x01"]]}, "enum"),
    ],
)
def test_an_inexpressible_schema_is_refused(schema, reason):
    with pytest.raises(GrammarError, match=f"JSON schema.*{reason}"):
        Grammar.of_schema(schema)


def test_a_definition_that_refers_only_to_itself_allows_no_token(model):
    grammar = Grammar.of_schema({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}})
    with pytest.raises(GrammarError, match="no token"):
        Constraint(model.engine.token_tries.get(), grammar).allowed()


def test_a_client_cannot_change_how_json_is_written(accepts):
    check(accepts, {"x-guidance": {"key_separator": "=", "zzz": 1}}, [{"a": 1}], [])


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
def test_attacks_take_seconds_at_most(in_a_hurry, model, schema):
    """A refusal and a normal start of the answer are both acceptable."""
    memory = psutil.Process().memory_info().rss
    started_s = time.perf_counter()
    with suppress(GrammarError):
        constraint = Constraint(model.engine.token_tries.get(), Grammar.of_schema(schema))
        for _ in range(50):
            constraint.accept(int(constraint.allowed()[-1]))
    assert time.perf_counter() - started_s < 10
    assert psutil.Process().memory_info().rss - memory < 200 * 2**20
