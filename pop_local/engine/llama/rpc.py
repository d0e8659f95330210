"""llama.cpp's RPC backend: devices on other machines.

llama.cpp aborts if a server's reply is invalid, and waits forever for a server that is busy. So
each server is probed before a model is loaded. A server that disconnects later still ends the
process (`logs.on_abort`).
"""

import atexit
import ctypes
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from weakref import WeakSet

import psutil

from pop_converter.base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.devices import GgmlLibrary, Kind

DEFAULT_PORT = 50052  # the default of llama.cpp's rpc-server
_TIMEOUT_S = 5.0
# A server's timeouts: for a hello, and between commands while another client waits.
_HELLO_S, _IDLE_S = 4, 600
# RPC_CMD_HELLO, the size of its request, and 24 bytes of capabilities; see rpc_msg_hello_rsp.
_HELLO = struct.pack("<BQ24x", 14, 24)
_HELLO_ANSWER = struct.pack("<Q", 28)
_POINTER = ctypes.c_void_p

# Servers of open models are busy, so they are not probed.
_in_use: "WeakSet[Servers]" = WeakSet()
_models: "WeakSet[Any]" = WeakSet()


def close_at_exit(model: Any) -> None:
    """Close a model on servers before the interpreter exits.

    A server that disconnects later would hang the process, which can no longer report it.
    """
    _models.add(model)


@atexit.register
def _close_models() -> None:
    for model in list(_models):
        model.close()


def address(server: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raises PopError for other text."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise PopError(f"{server!r} is not the address of an RPC server", "give it as HOST:PORT")
    return host, int(port)


class Servers:
    """A model's RPC servers in this order, followed by local GPUs.

    `handles`: the devices, for `llama_model_params.devices`. The caller must keep the object while
    the model is open. Raises PopError for a server that cannot be reached.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        ggml = GgmlLibrary()
        add = _function(ggml, "ggml_backend_rpc_add_server", _POINTER, ctypes.c_char_p)
        devices: list[int] = []
        for name in names:
            if not any(name in servers.names for servers in _in_use):
                _probe(name)
            registered = _POINTER(add(name.encode()))
            for i in range(ggml("ggml_backend_reg_dev_count", ctypes.c_size_t, registered)):
                index = ctypes.c_size_t(i)
                devices.append(ggml("ggml_backend_reg_dev_get", _POINTER, registered, index))
        devices += ggml.gpus()
        self.handles = (_POINTER * (len(devices) + 1))(*devices)
        _in_use.add(self)


def serve(host: str, port: int, n_threads: int, memory_bytes: int | None = None) -> NoReturn:
    """Serve this machine's GPUs, or its CPU if it has none, to one client at a time.

    `memory_bytes`: a client's memory limit (None: the free memory on a CPU, no limit on GPUs). A
    client that is idle for long is disconnected if another one waits. llama.cpp logs to standard
    output. Python handles no signals while it serves. Raises PopError if it cannot listen, and
    does not return otherwise.
    """
    ggml = GgmlLibrary()
    cpus = [device for device in ggml.devices() if ggml.kind(device) == Kind.CPU]
    devices = ggml.gpus() or cpus
    if memory_bytes is None:
        memory_bytes = 2**64 - 1 if ggml.gpus() else psutil.virtual_memory().available
    limits = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
    _function(ggml, "ggml_pop_rpc_set_limits", None, *limits)(_HELLO_S, _IDLE_S, memory_bytes)
    start = _function(
        *(ggml, "ggml_backend_rpc_start_server", None),
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, _POINTER),
    )
    handles = (_POINTER * len(devices))(*devices)
    try:
        endpoint = f"{socket.gethostbyname(host)}:{port}"
    except (OSError, UnicodeError) as error:  # the IDNA codec raises UnicodeError
        reason = getattr(error, "strerror", None) or error
        raise PopError(f"{host} is not an address of this machine: {reason}") from error
    start(endpoint.encode(), None, n_threads, len(devices), handles)
    raise PopError(
        f"cannot listen on {host} port {port}", "choose another port: a program may use this one"
    )


def _function(
    ggml: GgmlLibrary, name: str, result_type: Any, *argument_types: Any
) -> Callable[..., Any]:
    function = ggml.function("RPC", name, result_type, *argument_types)
    if function is None:
        raise PopError("this llama.cpp was built without RPC", backend.INSTALL_HINT)
    return function


def _probe(server: str) -> None:
    """Send llama.cpp's hello command. Raises PopError if the reply is invalid."""
    try:
        with socket.create_connection(address(server), _TIMEOUT_S) as connection:
            connection.sendall(_HELLO)
            with connection.makefile("rb") as answer:
                is_rpc = answer.read(len(_HELLO_ANSWER)) == _HELLO_ANSWER
    except TimeoutError as error:
        raise PopError(
            f"the RPC server {server} does not answer",
            "it serves one client at a time: stop the other client",
        ) from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PopError(
            f"the RPC server {server} cannot be reached: {reason}",
            "start an RPC server there",
            cause="rpc-unreachable",
        ) from error
    if not is_rpc:
        raise PopError(
            f"{server} is not an RPC server of this version",
            "give the port of a server from the same version of llama.cpp",
            cause="rpc-unreachable",
        )
