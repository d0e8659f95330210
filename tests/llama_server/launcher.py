"""Translate llama-server's options, as its tests pass them, to those of `pop-local serve`."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from llama_server.standin_model import stand_in
from pop_local.__main__ import main as pop_local
from pop_local.commands import opening, serve
from pop_local.engine.llama.context import ContextOptions
from pop_local.server import app

# A test's server starts in a fraction of a second if its parent has imported these modules.
PRELOADED = (opening, serve, app)


def main(arguments: list[str], log: str) -> None:
    """Serve until terminated, and append all output to the file `log`."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port")
    parser.add_argument("--alias", default="stand-in")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--cors-origins", default="")
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--kv-unified", action="store_true")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--chat-template")
    parser.add_argument("--chat-template-file", type=Path)
    options, _ = parser.parse_known_args(arguments)
    template = options.chat_template
    if options.chat_template_file is not None:
        template = options.chat_template_file.read_text(encoding="utf-8")
    model = stand_in(Path(os.environ["POP_STAND_INS"]), template, options.temp)
    if options.batch_size:  # `serve` has no option for it
        n_batch = {"n_batch": options.batch_size, "n_ubatch": options.batch_size}
        opening.ContextOptions = partial(ContextOptions, **n_batch)  # type: ignore[misc,assignment]
    # llama-server divides its context among the slots.
    n_ctx = options.ctx_size if options.kv_unified else options.ctx_size // options.parallel
    sys.argv = ["pop-local", "serve", str(model), "--host", options.host, "--port", options.port]
    sys.argv += ["--name", options.alias, "--api-key", options.api_key, "--ctx", str(n_ctx)]
    sys.argv += ["--parallel", str(options.parallel), "--threads", "1"]
    pop_local()
