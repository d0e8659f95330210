"""Hints for errors that name the command line's options and commands (hints.toml).

The library's own hints are for Python callers.
"""

import errno
import functools
from pathlib import Path
from typing import Literal

import tomlkit

from pop_converter.base.errors import PopError

TRACE = "`pop-local --debug COMMAND ...` shows the traceback"
GAVE_UP = "the model file may be damaged; download it again or use another model"
MEMORY = "close other programs, or use a smaller model or context (--ctx)"
_SPACE = "free some space, or write to another disk"
_PERMISSION = "check the permissions of the file and of its folder"
_BY_ERRNO = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "this disk is read-only; use another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "pass a file instead of a folder",
    errno.ENOMEM: MEMORY,
}


@functools.cache
def hints_for(kind: Literal["causes", "commands", "options"]) -> dict[str, str]:
    """Return the hints for errors by cause, or for other programs' commands or options."""
    text = Path(__file__).with_suffix(".toml").read_text("utf-8")
    return dict(tomlkit.parse(text).unwrap()[kind])


def hint_of(error: PopError) -> str:
    """Return the command line's hint, else the library's, which may be empty."""
    template = hints_for("causes").get(error.cause, "{hint}")
    return template.format_map({**error.fields, "hint": error.hint})


def os_hint(error: OSError) -> str:
    return _BY_ERRNO.get(error.errno or 0, TRACE)
