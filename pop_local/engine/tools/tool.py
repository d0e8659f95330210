"""The tools of a request."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pop_converter.base.errors import PopError

# With these, properties may be named elsewhere.
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas"}
_NO_ARGUMENTS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]

    @property
    def rule(self) -> str:
        """The name within a rule of llama.cpp's grammars (json-schema-to-grammar.cpp)."""
        return re.sub(r"[^a-zA-Z0-9-]+", "-", self.name)

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of arguments: none but those that are named, unless it says otherwise."""
        given = self.parameters or _NO_ARGUMENTS
        is_plain = "properties" in given and not given.keys() & _COMBINED
        return {"additionalProperties": False, **given} if is_plain else given

    @property
    def openai(self) -> dict[str, Any]:
        """The tool as OpenAI's clients send it, which templates expect."""
        function = {"name": self.name, "description": self.description}
        parameters = self.parameters or _NO_ARGUMENTS
        return {"type": "function", "function": {**function, "parameters": parameters}}


@dataclass(frozen=True)
class Tools:
    """The tools of which a prompt tells, and how many calls the answer has.

    `callable_`: the tools that may be called. `must_call`: whether one has to be. `several`:
    whether more than one may be. Raises PopError for names that are too much alike.
    """

    told: tuple[Tool, ...]
    callable_: tuple[Tool, ...]
    must_call: bool = False
    several: bool = True

    def __post_init__(self) -> None:
        rules: dict[str, str] = {}
        for tool in self.told:
            if other := rules.get(tool.rule):
                raise PopError(f"the tools {other!r} and {tool.name!r} are named alike")
            rules[tool.rule] = tool.name

    @property
    def names(self) -> Sequence[str]:
        return [tool.name for tool in self.callable_]
