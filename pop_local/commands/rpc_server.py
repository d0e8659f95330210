"""`pop-local rpc-server`: this machine's devices for a model that another one opens."""

import os
import signal
import sys
from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated

import typer

from pop_local.commands.shared_options import Threads, finite
from pop_local.engine.llama import rpc
from pop_local.engine.llama.threads import default_threads
from pop_local.ui.theme import note, warn

_MEMORY = "That a client may take. Default: what is free, on GPUs no limit."


def rpc_server(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all networks.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = rpc.DEFAULT_PORT,
    threads: Threads = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GB", min=0.0, max=1e9, help=_MEMORY, callback=finite),
    ] = None,
) -> None:
    """Hold layers of a model that another machine opens with --rpc: its GPUs, else the CPU.

    One client is served at a time; one that is silent for ten minutes gives way to another. The
    protocol knows no authentication and no encryption, and llama.cpp calls it a proof of concept:
    only for networks that you trust.
    """
    if not is_loopback(host):
        warn("Anyone who reaches this port can use, and crash, this machine: trust its network.")
    note(f"Lending this machine at {host}:{port} (Ctrl-C stops)")
    # llama.cpp prints to standard output, and Python's handlers do not run while it serves.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_DFL)
    rpc.serve(
        host, port, threads or default_threads(), None if memory is None else int(memory * 10**9)
    )


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, whatever a name server says."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"
