"""Hints for command-line users (hints.toml). The library's own hints are for Python callers."""

import errno
import functools
from pathlib import Path
from typing import Literal

import tomlkit

from pop_converter.base.errors import PopError

TRACE = "run `pop-local --debug COMMAND ...` to show the traceback"
GAVE_UP = "the model file may be damaged; download it again or use another model"
MEMORY = "close other programs, or use a smaller model or context (--ctx)"
_SPACE = "free up some disk space, or write to another disk"
_PERMISSION = "check the permissions on the file and its folder"
BY_ERRNO = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "this disk is read-only; use a folder on another disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: part of it is a file, not a folder",
    errno.EISDIR: "pass a file instead of a folder",
    errno.ENOMEM: MEMORY,
}


@functools.cache
def hints_for(kind: Literal["causes", "commands", "options"]) -> dict[str, str]:
    """Return the hints about causes of errors, other programs' commands, or removed options."""
    text = Path(__file__).with_suffix(".toml").read_text("utf-8")
    return dict(tomlkit.parse(text).unwrap()[kind])


def hint_of(error: PopError) -> str:
    """Return the command-line hint for an error (default: the library's hint)."""
    template = hints_for("causes").get(error.cause, "{hint}")
    if error.hint.endswith("?"):
        template = template.replace("{hint}.", "{hint}")
    return template.format_map({**error.fields, "hint": error.hint})
