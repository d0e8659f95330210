"""`pop-local rpc-server`: lend this machine's processors to another machine."""

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

_MEMORY = "Memory limit of a client (default: the free memory; GPUs: no limit)."


def rpc_server(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on (0.0.0.0: all networks).")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = rpc.DEFAULT_PORT,
    threads: Threads = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GB", min=0.0, max=1e9, help=_MEMORY, callback=finite),
    ] = None,
) -> None:
    """Run layers of a model that another machine opens with --rpc, on this machine's GPUs or CPU.

    The server accepts one client at a time and disconnects it after ten silent minutes if another
    one is waiting. The protocol has no authentication and no encryption, and llama.cpp calls it a
    proof of concept. Use it only on trusted networks.
    """
    if not is_loopback(host):
        warn("Anyone who can reach this port can use or crash this machine.")
    note(f"Lending this machine at {host}:{port} (Ctrl-C to stop)")
    # llama.cpp prints to stdout and blocks Python's signal handlers.
    sys.stdout.flush()
    os.dup2(2, 1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_DFL)
    rpc.serve(
        host, port, threads or default_threads(), None if memory is None else int(memory * 10**9)
    )


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, without a DNS lookup."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host.lower() == "localhost"
