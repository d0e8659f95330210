"""JSON schemas of typical programs, and answers sampled under them."""

import json
from enum import Enum
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pop_local.engine.decode.grammar import Grammar
from pop_local.engine.decode.grammar_mask import Constraint

Json = dict[str, Any]
# Supported formats that jsonschema can also check.
FORMATS = ["date-time", "time", "date", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
# Tokens that join a tiny vocabulary's letters to JSON.
PIECES = [
    '{"',
    '":',
    '",',
    '"}',
    '": "',
    '", "',
    "[]",
    "{}",
    '"}]',
    "},",
    "]}",
    "true",
    "null",
    "12",
]
# Longer answers end at the first opportunity.
_LONG = 80
_ENDING = ([b"}", b"]", b'"', b"@"], [b"n", b",", b":"])


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")
    street: str
    number: int = Field(ge=1, le=9999)
    postcode: str = Field(pattern=r"^[0-9]{5}$")
    country: Literal["de", "fr"] = "de"


class Person(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, max_length=12)
    age: int | None = Field(None, ge=0, lt=150)
    address: Address | None = None
    colours: list[Colour] = Field([], max_length=3)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    count: int = 0
    label: str | None = None
    __pydantic_extra__: dict[str, int] = Field(init=False)


class Tree(BaseModel):
    value: int
    children: list["Tree"] = Field([], max_length=2)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Cat | Dog] = []


class Measures(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weight: float = Field(gt=0, le=500)
    steps: int = Field(multiple_of=5, ge=0, le=1000)
    pair: tuple[int, str]
    maybe: bool | str | None = None


class Order(BaseModel):
    id: str = Field(json_schema_extra={"format": "uuid"})
    lines: list[Measures] = Field(min_length=1, max_length=2)
    notes: dict[str, str] = {}


def an_object(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": [*properties]}


def a_list(items: Any, **limits: int) -> Json:
    return {"type": "array", "items": items, **limits}


STRING, INTEGER, NUMBER, NULL = ({"type": each} for each in ("string", "integer", "number", "null"))
CLOSED = {"additionalProperties": False}
_NODE = {"type": "object", "properties": {"id": INTEGER, "next": {"$ref": "#/$defs/Node"}}}
_EXPRESSION = {
    "anyOf": [
        NUMBER,
        an_object(op={"enum": ["+", "*"]}, left={"$ref": "#/$defs/E"}, right={"$ref": "#/$defs/E"}),
    ]
}

REALISTIC: dict[str, Any] = {
    **{
        model.__name__: TypeAdapter(model).json_schema()
        for model in (Address, Person, Open, Tree, Owner, Measures, Order)
    },
    "list of models": TypeAdapter(list[Address]).json_schema(),
    "map of models": TypeAdapter(dict[str, Cat]).json_schema(),
    "optional and open": {"type": "object", "properties": {"a": INTEGER, "b": STRING}},
    "optional, open to numbers": {
        "type": "object",
        "properties": {"a": INTEGER, "b": STRING},
        "additionalProperties": NUMBER,
    },
    "open, of one needed": {**an_object(a=INTEGER), "additionalProperties": True},
    "optional and closed": {"type": "object", "properties": {"a": INTEGER, "b": STRING}, **CLOSED},
    "map": {"type": "object", "additionalProperties": INTEGER},
    "map of lists": {"type": "object", "additionalProperties": a_list(STRING, maxItems=2)},
    "map of at most two": {"type": "object", "additionalProperties": STRING, "maxProperties": 2},
    "map by pattern": {"type": "object", "patternProperties": {"^x-": STRING}, **CLOSED},
    "pattern beside names": {
        "type": "object",
        "properties": {"id": INTEGER},
        "patternProperties": {"^n_": NUMBER},
        "additionalProperties": {"type": "boolean"},
    },
    "at least one": {
        "type": "object",
        "properties": {"a": INTEGER, "b": INTEGER},
        "minProperties": 1,
        **CLOSED,
    },
    "strange names": {"type": "object", "properties": {"": INTEGER, "$ref": STRING, "a/b": NULL}},
    "linked list": {"$ref": "#/$defs/Node", "$defs": {"Node": _NODE}},
    "expression": {"$ref": "#/$defs/E", "$defs": {"E": _EXPRESSION}},
    "whole reference": a_list({"$ref": "#"}, maxItems=2),
    "formats": an_object(**{name: {**STRING, "format": name} for name in FORMATS}),
    "dates or none": a_list({"type": ["string", "null"], "format": "date"}, minItems=1),
    "duration": {**STRING, "format": "duration"},
    "patterns": an_object(
        code={**STRING, "pattern": "^[A-Z]{2}-[0-9]+$"}, part={**STRING, "pattern": "[^0-9]"}
    ),
    "pattern and length": {**STRING, "pattern": "^(ab)+$", "maxLength": 6},
    "lengths": an_object(
        a={**STRING, "minLength": 2, "maxLength": 3}, b={**STRING, "maxLength": 0}
    ),
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 1, "maxItems": 4},
    "closed tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
    "matrix": a_list(a_list(NUMBER, minItems=2, maxItems=2), minItems=1, maxItems=3),
    "any": {},
    "any object": {"type": "object"},
    "union": {"anyOf": [INTEGER, a_list(STRING), an_object(a=NULL)]},
    "one of": {"oneOf": [STRING, INTEGER, NULL]},
    "all of": {"allOf": [an_object(a=INTEGER), {"properties": {"b": STRING}, "required": ["b"]}]},
    "beside a reference": {
        "$ref": "#/$defs/A",
        "$defs": {"A": {**STRING, "minLength": 1}},
        "maxLength": 2,
    },
    "constants": a_list({"enum": ["a", "ab", 1, 1.5, None, True, {"k": [1]}, 'q"\\']}, minItems=1),
    "ranges": an_object(
        a={**INTEGER, "minimum": -12, "maximum": 120},
        b={**NUMBER, "exclusiveMinimum": 0, "maximum": 1.5},
        c={**NUMBER, "multipleOf": 0.25, "minimum": 0},
        d={**INTEGER, "exclusiveMinimum": 3},
    ),
}


class Answers:
    """Samples answers from random logits; long answers end at the first opportunity."""

    def __init__(self, trie: Any, seed: int = 0) -> None:
        self._trie = trie
        self._rng = np.random.default_rng(seed)
        pieces = [trie.decode_bytes([token]) for token in range(trie.vocab_size)]
        self._wish = np.zeros(trie.vocab_size)
        for rank, ending in enumerate(_ENDING):
            tokens = [token for token, piece in enumerate(pieces) if piece in ending]
            self._wish[tokens] = 50 - 20 * rank
        self._wish[trie.eos_tokens] = 99

    def sample(self, grammar: Grammar) -> str:
        """Sample one answer. Raises AssertionError if it does not end."""
        constraint = Constraint(self._trie, grammar)
        tokens: list[int] = []
        while True:
            allowed = constraint.allowed()
            logits = self._rng.gumbel(size=len(allowed))
            if len(tokens) > _LONG:
                logits += self._wish[allowed]
            token = int(allowed[logits.argmax()])
            if token in self._trie.eos_tokens:
                return bytes(self._trie.decode_bytes(tokens)).decode()
            tokens.append(token)
            assert len(tokens) < 20 * _LONG, self._trie.decode_str(tokens)
            constraint.accept(token)


def wrong(schema: Any, text: str) -> str:
    """Return why the text does not satisfy the schema and its formats; "" if it does."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"{text!r}: {error}"
    # xdist workers collect all tests, and building the URI grammar of jsonschema takes seconds.
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return "; ".join(f"{text!r}: {error.message}" for error in validator.iter_errors(value))
