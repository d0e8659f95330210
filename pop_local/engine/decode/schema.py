"""JSON schemas, written as llama_cpp's converter understands them.

It loses what stands beside a list of types, takes an empty schema for an object and an enum within
allOf for nothing, and mistakes names of definitions for those of properties and of its own rules.
"""

import json
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any
from urllib.parse import unquote

from pop_local.engine.decode.pattern import readable

Schema = dict[str, Any]

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
# They say nothing of what is allowed.
_ANNOTATIONS = {
    *("$schema", "$id", "$anchor", "$comment", "$defs", "definitions"),
    *("title", "description", "default", "examples", "example"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
# What the converter looks at, by type; it would resolve references within the rest, too.
_KEPT = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
}
# The converter's own name of any JSON value.
ANY: Schema = {"type": "value"}
_MOST_INTEGERS = 1000


def prepared(schema: Any) -> Schema:
    """Return a schema of the same values for the converter; an empty one stands for an object.

    Raises ValueError for what cannot be expressed, and whatever what is no schema leads to.
    """
    return _Document(schema).prepared()


class _Document:
    """One schema, and what it refers to in itself."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._names: dict[str, str] = {}
        self._shared: dict[str, Schema] = {}
        # Rules of properties begin with the property's name: none begins like this.
        self._prefix = "shared"
        text = json.dumps(schema)
        while self._prefix in text:
            self._prefix += "d"

    def prepared(self) -> Schema:
        found = self._plain({"type": "object"} if self._schema == {} else self._schema)
        if "$ref" in found:  # beside which the converter sees no definitions
            found = {"anyOf": [found]}
        return {**found, "$defs": self._shared}

    def _plain(self, schema: Any) -> Schema:
        if schema is True:
            return ANY
        if not isinstance(schema, dict):
            raise ValueError(f"{json.dumps(schema)} is no schema that a value can keep to")
        said = _without(schema, _ANNOTATIONS)
        match said:
            case {"$ref": ref}:
                return self._reference(ref)
            case {"const": value}:
                return {"enum": [value]}
            case {"enum": [_, *_] as values}:
                return {"enum": values}
            case {"oneOf": [_, *_] as several} | {"anyOf": [_, *_] as several}:
                return self._one_of(_without(said, {"oneOf", "anyOf"}), several)
            case {"type": [_, *_] as types}:
                return self._one_of({}, [_of_type(said, each) for each in types])
            case {"allOf": [_, *_] as parts}:
                return self._all_of(_without(said, {"allOf"}), parts)
            case {"enum": _} | {"oneOf": _} | {"anyOf": _} | {"allOf": _}:
                raise ValueError("enum, oneOf, anyOf and allOf are lists with something in them")
        return self._single(said) if said else ANY

    def _reference(self, ref: str) -> Schema:
        if ref not in self._names:
            name = self._names[ref] = f"{self._prefix}{len(self._names)}"
            self._shared[name] = self._plain(self._target(ref))
        return {"$ref": f"#/$defs/{self._names[ref]}"}

    def _target(self, ref: str) -> Any:
        if ref != "#" and not ref.startswith("#/"):
            raise ValueError(f"$ref {ref} is no path in the schema itself")
        found = self._schema
        for step in unquote(ref).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"what {ref} refers to is not there") from None
        return found

    def _one_of(self, beside: Schema, several: list[Any]) -> Schema:
        if "properties" in beside:
            several = [{"allOf": [beside, each]} for each in several]
        return {"anyOf": [self._plain(each) for each in several]}

    def _all_of(self, beside: Schema, parts: list[Any]) -> Schema:
        parts = [part for part in parts if part is not True and _without(part, _ANNOTATIONS)]
        if _without(beside, {"type"}) or not parts:
            parts.append(beside)
        if len(parts) == 1:
            return self._plain(parts[0])
        properties: Schema = {}
        required: list[str] = []
        for part in self._flat(parts):
            for one in (part, *map(self._resolved, part.get("anyOf", ()))):
                if not one.keys() & {"properties", "required", "anyOf"}:
                    raise ValueError("allOf joins nothing but objects with properties")
                properties |= one.get("properties", {})
                required += one.get("required", []) if one is part else []
        return self._plain({"type": "object", "properties": properties, "required": required})

    def _flat(self, parts: list[Any]) -> Iterator[Schema]:
        for part in map(self._resolved, parts):
            yield from self._flat(part.get("allOf", []))
            rest = _without(part, {"allOf", *_ANNOTATIONS})
            if rest and rest != {"type": "object"}:
                yield rest

    def _resolved(self, schema: Schema) -> Schema:
        return self._resolved(self._target(schema["$ref"])) if "$ref" in schema else schema

    def _single(self, said: Schema) -> Schema:
        kind = said.get("type")
        if kind is not None and kind not in _TYPES:
            raise ValueError(f"there is no type {json.dumps(kind)}")
        if kind == "integer" and (numbers := _integers(said)) is not None:
            return {"enum": numbers}
        kept = chain(*_KEPT.values()) if kind is None else _KEPT.get(kind, ())
        found = {name: said[name] for name in ("type", *kept) if name in said}
        if not found:
            raise ValueError(f"{json.dumps(said)} has no type")
        if "pattern" in found:
            found["pattern"] = readable(found["pattern"])
        if "properties" in found:
            named = found["properties"].items()
            found["properties"] = {name: self._plain(each) for name, each in named}
        if found.get("additionalProperties", False) is not False:
            found["additionalProperties"] = self._plain(found["additionalProperties"])
        items = found.pop("prefixItems", found.get("items", True))
        if isinstance(items, list):  # the converter makes just these
            found["items"] = [self._plain(each) for each in items]
        elif kind == "array" or "items" in found:
            found["items"] = self._plain(items)
        return found


def _without(schema: Schema, names: set[str]) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}


def _of_type(said: Schema, kind: Any) -> Schema:
    return {"type": "null"} if kind == "null" else {**said, "type": kind}


def _integers(said: Schema) -> list[int] | None:
    """Those within the bounds, None where they are open, or too many."""
    at_least, above = said.get("minimum"), said.get("exclusiveMinimum")
    at_most, below = said.get("maximum"), said.get("exclusiveMaximum")
    if isinstance(above, bool) or isinstance(below, bool):  # of draft 4
        return None
    lows = [] if at_least is None else [math.ceil(at_least)]
    lows += [] if above is None else [math.floor(above) + 1]
    highs = [] if at_most is None else [math.floor(at_most)]
    highs += [] if below is None else [math.ceil(below) - 1]
    if not lows or not highs or min(highs) - max(lows) >= _MOST_INTEGERS:
        return None
    if max(lows) > min(highs):
        raise ValueError(f"no integer is from {max(lows)} to {min(highs)}")
    return list(range(max(lows), min(highs) + 1))
