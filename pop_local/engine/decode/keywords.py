"""Keywords of JSON schemas: which ones are kept to, and what those of two schemas say together."""

import json
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any

Schema = dict[str, Any]

TYPES: dict[type, str] = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
# They say nothing of what is allowed.
_ANNOTATIONS = {
    *("$schema", "$id", "$anchor", "$comment", "$defs", "definitions"),
    *("title", "description", "default", "examples", "example"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
COMPOSING = {"$ref", "allOf", "anyOf", "oneOf"}
# What llama_cpp's converter looks at, by type.
KEPT = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
}
_LIMITS = {*chain(*KEPT.values()), "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KNOWN = {"type", "enum", *_LIMITS, *COMPOSING}


def said_by(schema: Any) -> Schema:
    """Return what a schema says of values, a const as an enum."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError(f"{json.dumps(schema)} is no schema that a value can keep to")
    found = without(schema, {"const", *_ANNOTATIONS})
    return {**found, "enum": [schema["const"]]} if "const" in schema else found


def without(schema: Schema, names: set[str]) -> Schema:
    """Return a schema that lacks some keywords."""
    return {name: value for name, value in schema.items() if name not in names}


def text_of(value: Any) -> str:
    """Return what only equal values have in common, as Python's 1 and True are not."""
    return json.dumps(value, sort_keys=True)


def kinds_of(kind: Any) -> list[Any]:
    """Return the types that are named, and the one that is a kind of number."""
    kinds = kind if isinstance(kind, list) else [kind]
    return [*kinds, "integer"] if "number" in kinds else kinds


def joined(one: Schema, other: Schema) -> Schema:
    """Return a schema of the values that both allow, neither being composed of others.

    Raises ValueError where their keywords cannot say that.
    """
    found = {**one, **other}
    for name in one.keys() & other.keys() & KNOWN - {"properties"}:
        if text_of(one[name]) != text_of(other[name]):
            if name not in _JOINING:
                raise ValueError(f"no value can be kept to two of {name}")
            found[name] = _JOINING[name](one[name], other[name])
    for this, that in ((one, other), (other, one)):
        # An enum is looked at alone, and items do not count beside prefixItems.
        if ("enum" in this and that.keys() & _LIMITS) or (
            "prefixItems" in this and "items" in that
        ):
            raise ValueError(f"{json.dumps(this)} and {json.dumps(that)} cannot be joined")
    if named := dict.fromkeys([*one.get("properties", {}), *other.get("properties", {})]):
        found["properties"] = {name: _both(_of(one, name), _of(other, name)) for name in named}
    return found


def _of(schema: Schema, name: str) -> Any:
    """What is said of a property, which may be one of those that are not named."""
    return schema.get("properties", {}).get(name, schema.get("additionalProperties", True))


def _both(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    if other is True or text_of(one) == text_of(other):
        return one
    return other if one is True else {"allOf": [one, other]}


def _common(one: list[Any], other: list[Any]) -> list[Any]:
    texts = [*map(text_of, other)]
    return [each for each in one if text_of(each) in texts]


_JOINING: dict[str, Callable[[Any, Any], Any]] = {
    "type": lambda one, other: _common(kinds_of(one), kinds_of(other)),
    "enum": _common,
    "required": operator.add,
    **dict.fromkeys(("items", "additionalProperties"), _both),
    **dict.fromkeys(("minLength", "minItems", "minimum", "exclusiveMinimum"), max),
    **dict.fromkeys(("maxLength", "maxItems", "maximum", "exclusiveMaximum"), min),
}
