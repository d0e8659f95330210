"""Hints for command-line users (hints.toml). The library's own hints are for Python callers."""

import functools
from pathlib import Path
from typing import Literal

import tomlkit

from pop_base.errors import PopError


@functools.cache
def hints_for(
    kind: Literal["causes", "commands", "errno", "failures", "options"],
) -> dict[str, str]:
    """Return one table of hints.toml."""
    text = Path(__file__).with_suffix(".toml").read_text("utf-8")
    return dict(tomlkit.parse(text).unwrap()[kind])


def hint_of(error: PopError) -> str:
    """Return the command-line hint for an error (default: the library's hint)."""
    template = hints_for("causes").get(error.cause, "{hint}")
    if error.hint.endswith("?"):
        template = template.replace("{hint}.", "{hint}")
    return template.format_map({**error.fields, "hint": error.hint})
