"""`pop-local analyze` on few tokens, for tests."""

import json
from typing import Any

from typer.testing import CliRunner

from pop_local.cli import app

SHORT = (
    *("--windows", 3, "--probe-windows", 2, "--context", 64, "--continuation", 10),
    *("--threads", 1, "--gpu-layers", 0),
)
UNFITTED = (*SHORT, "--no-fit")
FITTED = (*SHORT, "--no-gates", "--tokens", 2048)


def analyze(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def report(*arguments: object) -> Any:
    done = analyze(*arguments, *UNFITTED, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
