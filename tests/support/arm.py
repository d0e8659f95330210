"""Call ggml's functions in a program for ARM64, which runs in qemu (tests/try_arm_kernels.py).

POP_TEST_ARM names the folder of the program and of its libraries, and QEMU_CPU the processor. The
variables of this process, such as GGML_POP_KERNELS, apply to the program.
"""

import atexit
import ctypes
import functools
import os
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "POP_TEST_ARM"
PROGRAM = "arm_server"
SYSROOT = "/usr/aarch64-linux-gnu"
# Functions that copy between a tensor and this process's memory: (tensor, pointer, offset, size).
_WRITES, _READS = "ggml_backend_tensor_set", "ggml_backend_tensor_get"

Signatures = Mapping[str, tuple[list[Any], Any]]


def is_requested() -> bool:
    return FOLDER_VARIABLE in os.environ


class Server:
    """A running program, and its memory and functions by address."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            ["qemu-aarch64", "-L", SYSROOT, folder / PROGRAM, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._callback: Callable[[int | None], bool] | None = None
        self.cpu_library = self._line()

    def close(self) -> None:
        """End the program, which then writes the rest of qemu's log."""
        self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def read(self, address: int, size: int) -> bytes:
        self._send(f"read {address} {size}")
        return self._stdout.read(size)

    def write(self, address: int, data: bytes) -> None:
        self._send(f"write {address} {len(data)}", data)

    def string(self, address: int) -> bytes:
        return self.read(address, self.call(self.find("strlen"), address))

    def copy(self, data: bytes) -> int:
        """Return the address of a copy in the program's memory."""
        address = self.call(self.find("malloc"), len(data))
        self.write(address, data)
        return address

    def free(self, address: int) -> None:
        self.call(self.find("free"), address)

    @functools.cache  # noqa: B019 - one server per process
    def find(self, name: str) -> int:
        self._send(f"find {name}")
        address = int(self._line())
        if address == 0:
            raise LookupError(f"the program has no function {name}")
        return address

    def call(self, address: int, *arguments: int | float) -> int:
        """Call a function with integers and floats, and return its integer result."""
        self._send(" ".join([f"call {address}", *map(_word, arguments)]))
        while (line := self._line()) == "callback":
            if self._callback is not None:
                self._callback(None)
            self._send("return")
        return int(line)

    def set_abort_callback(self, backend: int, callback: Any, _: None) -> None:
        self._callback = callback or None
        address = self.find("abort_callback") if callback else 0
        self.call(self.find("ggml_backend_cpu_set_abort_callback"), backend, address, 0)

    def _send(self, command: str, data: bytes = b"") -> None:
        self._stdin.write(command.encode() + b"\n" + data)
        self._stdin.flush()

    def _line(self) -> str:
        line = self._stdout.readline()
        if not line:
            raise OSError(f"the program ended with status {self._process.wait()}")
        return line.decode().rstrip("\n")


def _word(value: int | float) -> str:
    if isinstance(value, float):
        [bits] = struct.unpack("<I", struct.pack("<f", value))
        return f"f{bits}"
    return str(int(value))


class Library:
    """Functions of the program with ctypes' signatures."""

    def __init__(self, server: Server, signatures: Signatures) -> None:
        self._server = server
        self._signatures = signatures

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = self.function(self._server.find(name), *self._signatures[name])
        if name in (_WRITES, _READS):
            return functools.partial(self._copy, function, name == _WRITES)
        setattr(self, name, function)
        return function

    def function(self, address: int, argument_types: list[Any], result: Any) -> Callable[..., Any]:
        server = self._server

        def call(*arguments: Any) -> Any:
            copies: list[int] = []
            words: list[int | float] = []
            for value, kind in zip(arguments, argument_types, strict=True):
                if isinstance(value, bytes):
                    value += b"\0"
                if isinstance(value, bytes | ctypes.Structure | ctypes.Array):
                    copies.append(server.copy(bytes(value)))
                    words.append(copies[-1])
                else:
                    words.append(float(value) if kind is ctypes.c_float else int(value or 0))
            found = server.call(address, *words)
            for each in copies:
                server.free(each)
            return self._result(found, result)

        return call

    def _result(self, found: int, kind: Any) -> Any:
        if kind is None:
            return None
        if kind is ctypes.c_char_p:
            return self._server.string(found)
        return kind(found & 0xFF if kind is ctypes.c_bool else found).value

    def _copy(
        self, function: Any, writes: bool, tensor: int, pointer: int, offset: int, size: int
    ) -> None:
        data = ctypes.string_at(pointer, size) if writes else bytes(size)
        remote = self._server.copy(data)
        function(tensor, remote, offset, size)
        if not writes:
            ctypes.memmove(pointer, self._server.read(remote, size), size)
        self._server.free(remote)


@functools.cache
def server() -> Server:
    """Start the program in the folder that POP_TEST_ARM names."""
    started = Server(Path(os.environ[FOLDER_VARIABLE]))
    atexit.register(started.close)
    return started
