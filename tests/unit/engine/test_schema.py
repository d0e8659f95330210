"""JSON schemas: which values an answer may be, as the model's tokens are let through or not."""

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pop_local.engine.decode.grammar import GrammarError
from pop_local.engine.decode.schema import ANY, prepared
from pop_local.engine.decode.text import Pieces
from pop_local.engine.llama import backend
from support.calls import N_VOCAB, opened
from support.converted import tiny

Accepts = Callable[[Any, Any], bool]


class Raw(str):
    """A string that JSON's quotes are put around as it is."""


@pytest.fixture(scope="module")
def accepts(tmp_path_factory):
    """Whether the grammar of a schema lets a value through, byte by byte, and ends there."""
    with opened(tiny(tmp_path_factory.mktemp("schema"))) as model:
        pieces = Pieces(model.context.vocab)
        tokens = {pieces[token]: token for token in range(N_VOCAB) if len(pieces[token]) == 1}

        def accepts(schema: Any, value: Any) -> bool:
            grammar = model.grammars.of_schema(schema)
            model.grammars.check(grammar)
            child = model.grammars.take()
            child.call("start", grammar, "root")
            last = None
            is_raw = isinstance(value, Raw)
            text = f'"{value}"' if is_raw else json.dumps(value, ensure_ascii=False)
            eos = backend.bindings().llama_vocab_eos(model.context.vocab)
            for byte in [*text.encode(), None]:
                token = eos if byte is None else tokens[bytes([byte])]
                allowed = np.frombuffer(base64.b64decode(child.call("allowed", last)), np.uint8)
                if not np.unpackbits(allowed)[token]:
                    break
                last = token
            model.grammars.give_back(child)
            return last == eos

        yield accepts


def check(accepts: Accepts, schema: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not accepts(schema, value)] == []
    assert [value for value in wrong if accepts(schema, value)] == []


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


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
    for _ in range(30):  # each type looks at what is its own, not twice as much on each level
        nested = {
            "type": ["array", "null"],
            "items": {**an_object(a=nested), "type": ["object", "string"]},
        }
    check(accepts, nested, [None, [{"a": None}, "b"]], [1, [{"b": 1}]])


def test_values_may_begin_alike(accepts):
    right = ["a", "ab", "abc", "b", "", 1, 12, -1, {"a": 1}, "C:\\x", "a"]
    check(accepts, {"enum": right}, right, ["c", "abcd", 2, 123, {"a": 2}, "C:"])


def test_letters_are_written_as_such(accepts):
    schema = an_object(größe={"enum": ["männlich", "ärztlich"]})
    check(accepts, schema, [{"größe": "männlich"}], [{"größe": "a"}, {"grösse": "männlich"}])


def test_what_all_of_holds(accepts):
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
def test_of_several_schemas_each_holds(accepts, schema):
    right = [{"street": "s", "a": 1}, {"street": "s", "b": 2}]
    check(accepts, schema, right, [{"street": "s"}, {"a": 1}, {"street": "s", "a": 2}])


def test_what_two_say_of_one_property_holds(accepts):
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


def test_what_stands_beside_a_reference_holds(accepts):
    schema = {"$ref": "#/$defs/A", "maxLength": 2, "$defs": {"A": {**STRING, "minLength": 1}}}
    check(accepts, schema, ["a", "ab"], ["", "abc"])
    schema["$defs"] = {"A": {"type": ["string", "null"], "maxLength": 5}}
    check(accepts, schema, ["ab", None], ["abc"])
    schema["$defs"] = {"A": {"enum": ["a", "abc"]}}
    with pytest.raises(GrammarError, match="cannot be joined"):
        accepts(schema, "a")


def test_a_schema_that_holds_itself_may_be_joined(accepts):
    part = {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"n": {"type": "integer"}}}]}
    node = {"type": "object", "properties": {"next": part}}
    schema = {"$ref": "#/$defs/A", "$defs": {"A": node}}
    check(accepts, schema, [{"next": {"next": {"n": 1}}}, {}], [{"next": {"n": "a"}}, {"n": 1}])


def test_what_is_required_and_not_described_is_there(accepts):
    schema = {**ADDRESS, "anyOf": [{"required": ["a"]}, {"required": ["street"]}]}
    check(accepts, schema, [{"street": "s", "a": 5}, {"street": "s"}], [{"a": 5}])
    check(accepts, {"type": "object", "required": ["a"]}, [{"a": VALUES}], [{}])
    check(accepts, {"type": "object", "required": []}, [{}, {"a": 1}], [1])


def test_an_enum_has_values_of_its_type(accepts):
    check(accepts, {"type": ["string", "null"], "enum": ["F"]}, ["F"], [None])
    check(accepts, {"type": "number", "enum": ["F", 1, 1.5, True]}, [1, 1.5], ["F", True])


def test_without_a_type_any_value_goes(accepts):
    a_list = {"type": "array", "items": {}}
    check(accepts, a_list, [VALUES], [{}])
    check(accepts, {"type": "array", "maxItems": 2}, [[1, "a"], []], [[1, 2, 3]])
    check(accepts, an_object(a={"title": "A"}), [{"a": value} for value in VALUES], [{}])
    free = {"type": "object", "additionalProperties": True}
    check(accepts, free, [{"a": value} for value in VALUES], ["a"])
    check(accepts, {**free, **an_object(a=True)}, [{"a": 1, "b": 2}], [{"b": 2}])
    check(accepts, {"title": "Anything"}, VALUES, [])
    check(accepts, {}, [{"a": 1}], [[1], "a"])


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


def test_a_whole_schema_may_be_referred_to(accepts):
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
def test_a_short_range_of_integers_is_kept_to(accepts, bounds, right, wrong):
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
        (r"^\S\D$", ["ab"], [" b", "a1", '"b', "a\n"]),
        (r"^[^a]{2}$", ["bc", "é-"], ["ab", 'b"', "b\\", "\n\n"]),
        (r"^[ -~]+$", ["a [b] c~"], ['"', "é"]),
        (r"^[\]\-^]+$", ["]-^"], ["\\", "a"]),
        (r"^yes|no$", ["yes", "no"], ["yno", "yeso"]),
        (r"^\(\$[0-9]\)$", ["($5)"], ["5"]),
        (r"^\++[*?]+a?(?:b)*$", ["+*", "+++?*abb"], ["*", "+"]),
    ],
)
def test_what_a_pattern_matches_is_json(accepts, pattern, right, wrong):
    check(accepts, {"type": "string", "pattern": pattern}, right, wrong)
    for raw in wrong:  # not escaped either, as json.dumps has it
        assert not accepts({"type": "string", "pattern": pattern}, Raw(raw))


@pytest.mark.parametrize(
    "pattern",
    [
        *("a", "^a$|^b$", '^"$', r"^\\$", r"^\b$", "^(?!a)b$", r"^[\x41]$"),
        *("^a+?$", "^a??$", "^a{2}?$", "^a*+$", "^(ab)++$"),
    ],
)
def test_a_pattern_that_cannot_be_kept_to_is_refused(accepts, pattern):
    with pytest.raises(GrammarError, match="pattern"):
        accepts({"type": "string", "pattern": pattern}, "a")


@pytest.mark.parametrize(
    "schema",
    [
        False,
        [],
        {"enum": []},
        {"anyOf": []},
        {"type": "value"},
        {"type": []},
        {"minimum": 3},
        {"required": ["a"]},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "array", "items": False},
        {"$ref": "#anchor"},
        {"$ref": "other.json"},
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"allOf": [{"$ref": "#"}, ADDRESS]},
        {"allOf": [STRING, {"type": "integer"}]},
        {"allOf": [STRING, {"not": {"const": "a"}}]},
        {"allOf": [{"enum": ["a"]}, {"enum": ["b"]}]},
        {"allOf": [{"const": 1}, {"const": True}]},
        {"allOf": [{**STRING, "pattern": "^a$"}, {"pattern": "^b$"}]},
        {"allOf": [{**ADDRESS, "additionalProperties": False}, NEEDS_A]},
        {"allOf": [{"type": "array", "prefixItems": [{}]}, {"items": STRING}]},
        {"allOf": [{"anyOf": [STRING] * 11}] * 3},
        {"type": "string", "pattern": "^a+$", "maxLength": 2},
        {"type": "object", "required": ["a"], "additionalProperties": False},
    ],
)
def test_what_cannot_be_expressed_is_refused(accepts, schema):
    with pytest.raises(GrammarError):
        accepts(schema, {})


def test_what_says_nothing_of_values_is_left_out():
    said = {"type": "string", "title": "A", "default": {"$ref": "#/none"}, "not": {"$ref": "#/x"}}
    assert prepared(said) == {"type": "string", "$defs": {}}
    assert prepared(an_object(a={"examples": [1]}))["properties"] == {"a": ANY}
