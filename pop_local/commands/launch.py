"""`pop-local launch AGENT [MODEL]`: start a server and a coding agent that uses it."""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from pop_base.errors import PopError
from pop_local.commands import shared_options as opt
from pop_local.commands.agents import AGENTS
from pop_local.commands.opening import default_model
from pop_local.commands.option_expansion import expand_options
from pop_local.models.model_names import lookup
from pop_local.ui.console import note, say
from pop_local.ui.error_output import EXIT_FAILED
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.open import model_files

_PRINTED_PORT = 8080  # the default of `serve`
_PRINTED_KEY = "none"  # for a server that requires no key
_KEY = "POP_LOCAL_API_KEY"  # the variable that `serve` reads
_POLL_S = 0.1
_SERVING = re.compile(r"APIs at (http://\S+/v1)")


@expand_options
def launch(
    agent: Annotated[
        Literal["opencode", "codex", "aider", "qwen-code"],
        typer.Argument(metavar="AGENT", help="opencode, codex, aider, or qwen-code."),
    ],
    model: opt.OptionalModel = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENTS", help="The agent's arguments.")
    ] = None,
    *,
    prints: Annotated[
        bool, typer.Option("--print", help="Print the commands instead of running them.")
    ] = False,
    how: opt.MeasureOptions,
) -> None:
    """Start a coding agent that uses a local model.

    The command starts a server on a free port and stops it when the agent exits. The agent receives
    the server's address and a random API key in its arguments and environment variables. The
    agent's settings files stay unchanged.
    """
    if model and model.startswith("-"):
        raise typer.BadParameter("pass a model before the agent's arguments", param_hint="MODEL")
    entry = AGENTS[agent]
    if not prints and shutil.which(entry.program) is None:
        raise PopError(f"{agent} is not installed", f"install it with: {entry.install}")
    model = model or default_model()
    name = model if lookup(model) else re.sub(r"[^\w.-]+", "-", Path(model).stem)
    n_ctx = how.n_ctx or entry.n_ctx
    options = opt.given(name=name, ctx=n_ctx, sidecar=how.sidecar, threads=how.threads)
    options |= {"gpu-layers": how.gpu_layers}
    serving = ["serve", model, *(f"--{flag}={value}" for flag, value in options.items())]
    command = partial(entry.command, arguments or (), model=name, n_ctx=n_ctx)
    if prints:
        say(shlex.join(["pop-local", *serving, f"--port={_PRINTED_PORT}"]))
        url = f"http://127.0.0.1:{_PRINTED_PORT}/v1"
        say(shlex.join(command(url=url, key=_PRINTED_KEY)))
        if os.environ.get(_KEY):
            note(f"{_KEY} is set, so replace the key {_PRINTED_KEY!r} with its value.")
        return
    with terminal_watch() as watch:
        model_files(model, how.sidecar, watch)  # downloads a missing model, with a progress bar
    environment = {**os.environ, _KEY: secrets.token_urlsafe()}
    with _server(serving, environment) as url:
        # Ctrl-C is for the agent, which does not inherit a handler (unlike SIG_IGN).
        signal.signal(signal.SIGINT, lambda *_: None)
        words = command(url=url, key=environment.pop(_KEY))
        status = subprocess.run(words, env=environment, check=False).returncode
    raise typer.Exit(status if status >= 0 else 128 - status)


@contextmanager
def _server(arguments: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a server on a free port, and yield its URL once clients can connect.

    If the server exits before clients can connect, print its log and raise typer.Exit.
    """
    command = [sys.executable, "-m", "pop_local", *arguments, "--port=0"]
    with tempfile.TemporaryDirectory(prefix="pop-local-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as stderr:
            # In a new session, the server does not receive the terminal's Ctrl-C.
            server = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            note(f"Starting the server. The log file is {log}.")
            while (match := _SERVING.search(log.read_text("utf-8", "replace"))) is None:
                if server.poll() is not None:
                    sys.stderr.write(log.read_text("utf-8", "replace"))
                    raise typer.Exit(EXIT_FAILED)
                time.sleep(_POLL_S)
            yield match[1]
        finally:
            server.terminate()  # a server that hangs kills its own process after seconds
            server.wait()
