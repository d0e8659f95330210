"""Run RPC servers on this machine, each a `pop-local rpc-server` in a child process."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PATIENCE_S = 60


@dataclass(frozen=True)
class Server:
    """A running server; `name` is its HOST:PORT."""

    name: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def rpc_server(*arguments: object, changed: str = "") -> Iterator[Server]:
    """Run a server with more arguments, after the code `changed` in its process."""
    port = free_port()
    program = f"{changed}\nfrom pop_local.__main__ import main; main()"
    command = [sys.executable, "-c", program, "rpc-server", "--port", port, "--threads", 1]
    command += arguments
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield Server(f"127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            with socket.create_connection(("127.0.0.1", port)):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the server does not listen")
