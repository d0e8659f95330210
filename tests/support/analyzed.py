"""Run `pop-local analyze` on one thread."""

import json
from typing import Any

from typer.testing import CliRunner

from pop_local.cli import app


def analyze(*arguments: object) -> Any:
    options = ("--threads", 1, "--gpu-layers", 0)
    return CliRunner().invoke(app, ["analyze", *map(str, (*arguments, *options))])


def report(*arguments: object) -> Any:
    done = analyze(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
