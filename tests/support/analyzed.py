"""Run `pop-local analyze` on few tokens."""

import json
from typing import Any

from typer.testing import CliRunner

from pop_local.cli import app

SHORT = (
    *("--probe-windows", 2, "--context", 64, "--continuation", 10),
    *("--threads", 1, "--gpu-layers", 0),
)
UNFITTED = (*SHORT, "--no-fit")
FITTED = (*SHORT, "--no-gates", "--tokens", 2048)


def analyze(*arguments: object) -> Any:
    has_gates = not {"--no-gates", "--windows"} & set(arguments)
    windows = ("--windows", 3) if has_gates else ()
    return CliRunner().invoke(app, ["analyze", *map(str, (*arguments, *windows))])


def report(*arguments: object) -> Any:
    done = analyze(*arguments, *UNFITTED, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
