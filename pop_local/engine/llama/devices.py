"""ggml's backends, devices, and CPU kernels."""

import ctypes
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pop_base.errors import PopError
from pop_local.engine.llama import backend

_POINTER = ctypes.c_void_p
NO_KERNELS = "none"
_BUSY_SAMPLE_S = 0.2
KERNELS_OFF = "off"
# Selects the instruction set of pop-local's kernels ("0": llama.cpp's kernels).
KERNELS_VARIABLE = "GGML_POP_KERNELS"
_REMOVED_KERNELS = ("i8mm", "dotprod")
# GGML_BACKEND_DEVICE_TYPE_GPU and GGML_BACKEND_DEVICE_TYPE_IGPU.
_GPU_TYPES = (1, 2)


@dataclass(frozen=True)
class Device:
    """A ggml device."""

    name: str
    description: str
    is_gpu: bool
    memory_free_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class BackendInfo:
    """A description of the loaded backend, shown by the `doctor` command.

    `abi`: None if the library is unpatched. `built_in`: (name, number of devices) for each ggml
    backend. `cpu_variant`: the variant of the CPU library that ggml loaded, or "" if the build has
    only one variant. `kernels`: the result of `cpu_kernels`.
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
    """Describe the loaded llama.cpp library. Raises PopError if loading fails."""
    llama_cpp = backend.bindings()
    return BackendInfo(
        version=backend.version(),
        library_path=Path(llama_cpp._lib._name),
        abi=backend.library_abi(),
        devices=devices(),
        built_in=tuple(_built_in()),
        features=llama_cpp.llama_print_system_info().decode(),
        n_threads=default_threads(),
        cpu_variant=_cpu_variant("".join(getattr(llama_cpp, "_backends_log", ()))),
        kernels=cpu_kernels(),
    )


def cpu_kernels() -> str:
    """Return the name of pop-local's kernels for this CPU (ggml_pop_kernels).

    Returns NO_KERNELS if no kernels support the CPU, or KERNELS_OFF if GGML_POP_KERNELS=0 is set.
    Raises PopError if the variable names removed kernels.
    """
    name = os.environ.get(KERNELS_VARIABLE)
    if name in _REMOVED_KERNELS:
        raise PopError(
            f"{KERNELS_VARIABLE}={name} selects kernels for ARM64, which were removed",
            f"unset {KERNELS_VARIABLE} to use llama.cpp's kernels",
        )
    cpu = ggml("ggml_backend_reg_by_name", _POINTER, b"CPU")
    get = "ggml_backend_reg_get_proc_address"  # also finds functions of a separate CPU library
    address = cpu and ggml(get, _POINTER, _POINTER(cpu), b"ggml_pop_kernels")
    return ctypes.CFUNCTYPE(ctypes.c_char_p)(address)().decode() if address else NO_KERNELS


def has_kernels() -> bool:
    """Return True if pop-local's kernels support this CPU and are enabled."""
    return cpu_kernels() not in (NO_KERNELS, KERNELS_OFF)


def _cpu_variant(log: str) -> str:
    """Return the CPU variant from the library file name in ggml's log, or ""."""
    match = re.search(r"loaded CPU backend from .*ggml-cpu-(.+)\.\w+$", log, re.MULTILINE)
    return match[1] if match else ""


def default_threads() -> int:
    """Return the number of physical cores that this process may use.

    Two threads on the same core are slower than one.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        try:
            return len({Path(siblings.format(cpu)).read_text() for cpu in cpus})
        except OSError:
            return len(cpus)
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def busy_cpus(n_threads: int) -> float:
    """Return the number of busy logical CPUs, or 0.0 if at least `n_threads` CPUs are idle."""
    n_cpus = os.cpu_count() or 1
    n_busy = psutil.cpu_percent(_BUSY_SAMPLE_S) * n_cpus / 100
    return n_busy if n_busy + n_threads >= n_cpus + 0.5 else 0.0


def devices() -> tuple[Device, ...]:
    """Return all devices in ggml's order, which puts the CPU last."""
    all_devices = []
    for i in range(ggml("ggml_backend_dev_count", ctypes.c_size_t)):
        device = _POINTER(ggml("ggml_backend_dev_get", _POINTER, ctypes.c_size_t(i)))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml("ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total))
        all_devices.append(
            Device(
                name=ggml("ggml_backend_dev_name", ctypes.c_char_p, device).decode(),
                description=ggml("ggml_backend_dev_description", ctypes.c_char_p, device).decode(),
                is_gpu=ggml("ggml_backend_dev_type", ctypes.c_int, device) in _GPU_TYPES,
                memory_free_bytes=free.value,
                memory_total_bytes=total.value,
            )
        )
    return tuple(all_devices)


def _built_in() -> Iterator[tuple[str, int]]:
    """Yield each built-in backend's name and number of devices."""
    for i in range(ggml("ggml_backend_reg_count", ctypes.c_size_t)):
        registered = _POINTER(ggml("ggml_backend_reg_get", _POINTER, ctypes.c_size_t(i)))
        name = ggml("ggml_backend_reg_name", ctypes.c_char_p, registered).decode()
        yield name, ggml("ggml_backend_reg_dev_count", ctypes.c_size_t, registered)


def ggml(name: str, result_type: Any, *arguments: Any) -> Any:
    """Call a ggml function by name, because llama_cpp binds only a few ggml functions.

    Raises PopError if the library lacks the function.
    """
    for library in _libraries():
        if (function := getattr(library, name, None)) is not None:
            function.restype = result_type
            return function(*arguments)
    raise PopError(f"the backend lacks the function {name}", backend.INSTALL_HINT)


@functools.cache
def _libraries() -> list[ctypes.CDLL]:
    llama_cpp = backend.bindings()
    from llama_cpp._ctypes_extensions import load_shared_library

    return [load_shared_library(name, llama_cpp._base_path) for name in ("ggml", "ggml-base")]
