"""JSON schemas, written as llama_cpp's converter understands them.

It loses what stands beside a list of types, takes an empty schema for an object and an enum within
allOf for nothing, and mistakes names of definitions for those of properties and of its own rules.
"""

import json
import math
from collections.abc import Callable
from functools import reduce
from itertools import chain, product
from typing import Any
from urllib.parse import unquote

from pop_local.engine.decode.keywords import (
    COMPOSING,
    KEPT,
    KNOWN,
    TYPES,
    Schema,
    joined,
    kinds_of,
    said_by,
    without,
)
from pop_local.engine.decode.pattern import readable

# The converter's own name of any JSON value.
ANY: Schema = {"type": "value"}
_MOST_INTEGERS = 1000
_MOST_ALTERNATIVES = 1000


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
        said = said_by(schema)
        match said:
            case {"$ref": ref} if len(said) == 1:
                return self._named(ref, lambda: self._plain(self._target(ref)))
            case {"allOf": [part]} if len(said) == 1:
                return self._plain(part)
            case {"anyOf": [_, *_] as parts} | {"oneOf": [_, *_] as parts} if len(said) == 1:
                return {"anyOf": [self._plain(each) for each in parts]}
        if said.keys() & COMPOSING:
            return self._named(json.dumps(said), lambda: self._any_of(self._expanded(said)))
        return self._single(said)

    def _named(self, key: str, make: Callable[[], Schema]) -> Schema:
        """Refer to a definition, which is made once, as it may be large or hold itself."""
        if key not in self._names:
            name = self._names[key] = f"{self._prefix}{len(self._names)}"
            self._shared[name] = make()
        return {"$ref": f"#/$defs/{self._names[key]}"}

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

    def _expanded(self, schema: Any) -> list[Schema]:
        """Return alternatives that together allow the same, each without parts and references."""
        said = said_by(schema)
        if said and not said.keys() & KNOWN:
            raise ValueError(f"nothing of {json.dumps(said)} can be kept to")
        parts = [self._target(said["$ref"])] if "$ref" in said else []
        parts += said.get("allOf", [])
        choices = [*map(self._expanded, parts), [without(said, COMPOSING)]]
        for name in ("anyOf", "oneOf"):
            if name in said:
                choices.append([*chain(*map(self._expanded, said[name]))])
        n_alternatives = math.prod(map(len, choices))
        if not 0 < n_alternatives <= _MOST_ALTERNATIVES:
            raise ValueError(f"anyOf and oneOf leave {n_alternatives} alternatives")
        return [reduce(joined, several) for several in product(*choices)]

    def _any_of(self, several: list[Schema]) -> Schema:
        return {"anyOf": [self._single(each) for each in several]}

    def _single(self, said: Schema) -> Schema:
        match said:
            case {"enum": [*values], "type": kind}:
                fitting = [each for each in values if TYPES[type(each)] in kinds_of(kind)]
                return self._single({"enum": fitting})
            case {"enum": [_, *_] as values}:
                return {"enum": values}
            case {"type": [_, *_] as kinds} if "enum" not in said:
                return self._any_of([{**said, "type": kind} for kind in kinds])
            case {"enum": _} | {"type": []}:
                raise ValueError(f"no value keeps to {json.dumps(said)}")
        kind = said.get("type")
        if kind is not None and kind not in TYPES.values():
            raise ValueError(f"there is no type {json.dumps(kind)}")
        if kind == "integer" and (numbers := _integers(said)) is not None:
            return self._named(f"{numbers[0]} to {numbers[-1]}", lambda: {"enum": numbers})
        kept = chain(*KEPT.values()) if kind is None else KEPT.get(kind, ())
        found = {name: said[name] for name in ("type", *kept) if name in said}
        if not found and said:
            raise ValueError(f"{json.dumps(said)} has no type")
        return self._within(found) if found else ANY

    def _within(self, found: Schema) -> Schema:
        if "pattern" in found:
            if found.keys() & {"minLength", "maxLength"}:
                raise ValueError("beside a pattern no length is kept to: say it in the pattern")
            found["pattern"] = readable(found["pattern"])
        others = found.get("additionalProperties", True)
        named = found.get("properties", {})
        if "properties" in found or found.get("type") == "object":
            # The converter overlooks what is required and has no schema of its own.
            named = {**dict.fromkeys(found.get("required", ()), others), **named}
        if named or "properties" in found:
            found["properties"] = {name: self._plain(each) for name, each in named.items()}
        if found.get("additionalProperties", False) is not False:
            found["additionalProperties"] = self._plain(others)
        items = found.pop("prefixItems", found.get("items", True))
        if isinstance(items, list):  # the converter makes just these
            found["items"] = [self._plain(each) for each in items]
        elif found.get("type") == "array" or "items" in found:
            found["items"] = self._plain(items)
        return found


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
