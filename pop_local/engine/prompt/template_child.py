"""The process in which chat templates are rendered: programs that come with a model, from anybody.

Jinja's sandbox keeps them from what is outside of it, not from all time and memory.
"""

import functools
import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 26


class _Generation(Extension):
    """The block {% generation %} of transformers, which marks what is trained on: its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Environment:
    """Return what llama_cpp and transformers render chat templates with."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    found.filters["tojson"] = _tojson
    return found


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return environment().from_string(template)


class TemplateRenderer:
    """Renders templates in a child process."""

    @staticmethod
    def rendered(template: str, arguments: dict[str, Any] | None) -> str:
        """Render a template; without arguments, only see whether it is one.

        Raises ValueError where it refuses, and whatever it does besides.
        """
        if arguments is None:
            _compiled(template)
            return ""
        functions = {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        text = _compiled(template).render(**arguments, **functions)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it makes {len(text):,} characters of it")
        text.encode()
        return text
