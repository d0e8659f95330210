"""Tools that a prompt describes and that an answer may call."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pop_base.errors import PopError

# Schemas with these keywords may define properties elsewhere.
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas"}
_NO_ARGUMENTS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `parameters`: the JSON schema for the arguments."""

    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def rule(self) -> str:
        """Return the tool's name in llama.cpp's grammar rules (json-schema-to-grammar.cpp)."""
        return re.sub(r"[^a-zA-Z0-9-]+", "-", self.name)

    @property
    def schema(self) -> dict[str, Any]:
        """Return the arguments' schema, with `additionalProperties` set to false by default."""
        parameters = self.parameters or _NO_ARGUMENTS
        is_plain = "properties" in parameters and not parameters.keys() & _COMBINED
        return {"additionalProperties": False, **parameters} if is_plain else parameters

    @property
    def openai(self) -> dict[str, Any]:
        """Return the tool in OpenAI's format, which templates expect."""
        function = {"name": self.name, "description": self.description}
        parameters = self.parameters or _NO_ARGUMENTS
        return {"type": "function", "function": {**function, "parameters": parameters}}


@dataclass(frozen=True)
class Tools:
    """A prompt's tools, and the calls that the answer may contain.

    `all`: tools that the prompt describes. `callable_`: tools that may be called. `must_call`:
    whether a call is required. `several`: whether to allow more than one call. Raises PopError if
    two tools have the same rule name.
    """

    all: tuple[Tool, ...]
    callable_: tuple[Tool, ...]
    must_call: bool = False
    several: bool = True

    def __post_init__(self) -> None:
        rules: dict[str, str] = {}
        for tool in self.all:
            if other := rules.get(tool.rule):
                names = f"{other!r} and {tool.name!r}"
                message = f"two tools have the same name if punctuation is ignored: {names}"
                raise PopError(message, "rename one of them")
            rules[tool.rule] = tool.name

    @property
    def names(self) -> Sequence[str]:
        return [tool.name for tool in self.callable_]
