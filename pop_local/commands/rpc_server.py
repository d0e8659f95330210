"""`pop-local rpc-server`: this machine's devices for a model that another one opens."""

import os
import signal
import sys
from typing import Annotated

import typer

from pop_local.commands.options import Threads
from pop_local.engine.llama import rpc
from pop_local.engine.llama.threads import default_threads
from pop_local.ui.theme import note, warn


def rpc_server(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all networks.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = rpc.DEFAULT_PORT,
    threads: Threads = None,
) -> None:
    """Hold layers of a model that another machine opens with --rpc: its GPUs, else the CPU.

    One client is served at a time. The protocol knows no authentication and no encryption, and
    llama.cpp calls it a proof of concept: only for networks that you trust.
    """
    if not host.startswith(("127.", "localhost")):
        warn("Anyone who reaches this port can use, and crash, this machine: trust its network.")
    note(f"Lending this machine at {host}:{port} (Ctrl-C stops)")
    # llama.cpp prints to standard output, and Python's handlers do not run while it serves.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_DFL)
    rpc.serve(host, port, threads or default_threads())
