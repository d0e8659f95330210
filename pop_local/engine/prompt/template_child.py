"""Child process that renders chat templates, which are untrusted programs.

Jinja's sandbox blocks access to files and modules but does not limit time or memory.
"""

import functools
import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 26


class _Generation(Extension):
    """The {% generation %} block, which Hugging Face Transformers uses to mark training text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    """Compile a template with the Jinja settings that llama_cpp and Transformers share."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)


class TemplateRenderer:
    """Methods that the parent process can call."""

    @staticmethod
    def rendered(template: str, arguments: dict[str, Any] | None) -> str:
        """Render a template. If `arguments` is None, compile the template and return "" instead.

        Raises ValueError if the template rejects the arguments, or other errors if rendering fails.
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
            raise ValueError(f"the rendered prompt is too long: {len(text):,} characters")
        text.encode()
        return text
