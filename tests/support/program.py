"""The command line, called in this process or run in one of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass

from typer.testing import CliRunner

from pop_local.cli import app


@dataclass(frozen=True)
class Done:
    """How a command ended, named as subprocess names it."""

    returncode: int
    stdout: str
    stderr: str


def called(*arguments: object, text: str = "", **environment: str) -> Done:
    """Calls a command here, with pipes for its streams. Raises what the command lets through."""
    words = [str(argument) for argument in arguments]
    done = CliRunner().invoke(app, words, input=text, env=environment, prog_name="pop-local")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


def run(*arguments: object, text: str = "", **environment: str) -> Done:
    """Runs a command in a process of its own, where imports, signals or the environment matter."""
    done = subprocess.run(
        [sys.executable, "-m", "pop_local", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=900,
    )
    return Done(done.returncode, done.stdout, done.stderr)
