"""ggml's backends and devices, and its functions by name."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from pop_converter.base.errors import PopError
from pop_local.engine.llama import backend
from pop_local.engine.llama.threads import default_threads

_POINTER = ctypes.c_void_p
NO_KERNELS = "none"
KERNELS_OFF = "off"


class Kind(IntEnum):
    """The values of enum ggml_backend_dev_type that pop-local uses."""

    GPU = 1
    INTEGRATED_GPU = 2


@dataclass(frozen=True)
class Device:
    """A ggml device; memory in bytes."""

    name: str
    description: str
    is_gpu: bool
    memory_free_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class BackendInfo:
    """Description of the backend for `doctor`.

    `abi`: None if the library is unpatched. `built_in`: ggml's backends, as (name, number of
    devices found). `cpu_variant`: name of the CPU library that ggml loaded, "" without variants.
    `kernels`: see `cpu_kernels`.
    """

    version: str
    library_path: Path
    abi: int | None
    devices: tuple[Device, ...]
    built_in: tuple[tuple[str, int], ...]
    features: str
    n_threads: int
    cpu_variant: str = ""
    kernels: str = NO_KERNELS


def describe_backend() -> BackendInfo:
    """Describe the patched or unpatched library. Raises PopError if it cannot be loaded."""
    llama_cpp = backend.bindings()
    return BackendInfo(
        version=backend.version(),
        library_path=Path(llama_cpp._lib._name),
        abi=backend.library_abi(),
        devices=devices(),
        built_in=tuple(GgmlLibrary().backends()),
        features=llama_cpp.llama_print_system_info().decode(),
        n_threads=default_threads(),
        cpu_variant=_cpu_variant("".join(getattr(llama_cpp, "_backends_log", ()))),
        kernels=cpu_kernels(),
    )


def cpu_kernels() -> str:
    """Return the name of pop-local's kernels for this CPU (ggml_pop_kernels).

    NO_KERNELS: no kernels exist for this CPU. KERNELS_OFF: the environment sets
    GGML_POP_KERNELS=0.
    """
    named = GgmlLibrary().function("CPU", "ggml_pop_kernels", ctypes.c_char_p)
    return NO_KERNELS if named is None else str(named().decode())


def has_kernels() -> bool:
    """Return whether pop-local's kernels exist for this CPU and are on."""
    return cpu_kernels() not in (NO_KERNELS, KERNELS_OFF)


def _cpu_variant(log: str) -> str:
    """Return the variant in the library's file name, from ggml's log."""
    found = re.search(r"loaded CPU backend from .*ggml-cpu-(.+)\.\w+$", log, re.MULTILINE)
    return found[1] if found else ""


def devices() -> tuple[Device, ...]:
    """Return ggml's devices in ggml's order, the CPU last."""
    ggml = GgmlLibrary()
    return tuple(ggml.device(handle) for handle in ggml.devices())


class GgmlLibrary:
    """ggml's functions by name, since llama_cpp binds few of them."""

    _LIBRARIES = ("ggml", "ggml-base")

    def __init__(self) -> None:
        from llama_cpp._ctypes_extensions import load_shared_library

        llama_cpp = backend.bindings()
        self._handles = [load_shared_library(n, llama_cpp._base_path) for n in self._LIBRARIES]

    def __call__(self, name: str, result_type: Any, *arguments: Any) -> Any:
        for handle in self._handles:
            if (function := getattr(handle, name, None)) is not None:
                function.restype = result_type
                return function(*arguments)
        raise PopError(f"the backend has no function {name}", backend.INSTALL_HINT)

    def function(
        self, of: str, name: str, result_type: Any, *argument_types: Any
    ) -> Callable[..., Any] | None:
        """Return a function of the ggml backend `of`, or None if the backend lacks it.

        This also finds functions of a backend in a separate file.
        """
        registered = self("ggml_backend_reg_by_name", _POINTER, of.encode())
        get = "ggml_backend_reg_get_proc_address"
        found = registered and self(get, _POINTER, _POINTER(registered), name.encode())
        return ctypes.CFUNCTYPE(result_type, *argument_types)(found) if found else None

    def devices(self) -> Iterator[int]:
        """Yield the pointers (ggml_backend_dev_t) of all devices."""
        for i in range(self("ggml_backend_dev_count", ctypes.c_size_t)):
            yield self("ggml_backend_dev_get", _POINTER, ctypes.c_size_t(i))

    def backends(self) -> Iterator[tuple[str, int]]:
        """Yield each built-in backend's name and number of devices."""
        for i in range(self("ggml_backend_reg_count", ctypes.c_size_t)):
            registered = _POINTER(self("ggml_backend_reg_get", _POINTER, ctypes.c_size_t(i)))
            name = self("ggml_backend_reg_name", ctypes.c_char_p, registered).decode()
            yield name, self("ggml_backend_reg_dev_count", ctypes.c_size_t, registered)

    def kind(self, device: int) -> int:
        """Return a device's `Kind`, or the number of an unlisted kind."""
        return int(self("ggml_backend_dev_type", ctypes.c_int, _POINTER(device)))

    def device(self, device: int) -> Device:
        handle = _POINTER(device)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("ggml_backend_dev_memory", None, handle, ctypes.byref(free), ctypes.byref(total))
        return Device(
            name=self("ggml_backend_dev_name", ctypes.c_char_p, handle).decode(),
            description=self("ggml_backend_dev_description", ctypes.c_char_p, handle).decode(),
            is_gpu=self.kind(device) in (Kind.GPU, Kind.INTEGRATED_GPU),
            memory_free_bytes=free.value,
            memory_total_bytes=total.value,
        )
