"""Run `pop-local analyze` on few tokens."""

import json
from typing import Any

from typer.testing import CliRunner

from pop_local.cli import app

SHORT = {
    "--tokens": 2048,
    "--threads": 1,
    "--gpu-layers": 0,
}


def analyze(*arguments: object) -> Any:
    given = [word for pair in SHORT.items() if pair[0] not in arguments for word in pair]
    return CliRunner().invoke(app, ["analyze", *map(str, (*arguments, *given))])


def report(*arguments: object) -> Any:
    done = analyze(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
