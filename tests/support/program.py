"""Call the command line in this process or run it in a child process."""

import os
import subprocess
import sys
from dataclasses import dataclass

from typer.testing import CliRunner

from pop_local.cli import app


@dataclass(frozen=True)
class Done:
    """A command's result, with the names that subprocess uses."""

    returncode: int
    stdout: str
    stderr: str


def called(*arguments: object, text: str = "", **environment: str) -> Done:
    """Call a command in this process with pipes as its streams. Raise its uncaught exceptions."""
    words = [str(argument) for argument in arguments]
    done = CliRunner().invoke(app, words, input=text, env=environment, prog_name="pop-local")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Done(done.exit_code, done.stdout, done.stderr)


def run(*arguments: object, text: str = "", **environment: str) -> Done:
    """Run a command in a child process, for tests of imports, signals or the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "pop_local", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=900,
    )
    return Done(done.returncode, done.stdout, done.stderr)
