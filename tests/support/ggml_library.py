"""Declare ggml in ctypes: tensors, the functions of libggml-base, the CPU device.

The library is the one that llama_cpp loads.
"""

import ctypes
import functools
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pop_local.engine.llama.backend import bindings


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h without its padding."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
    )


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_FLOAT = ctypes.c_float
# The abort callback, called after each node.
AbortCallback = ctypes.CFUNCTYPE(ctypes.c_bool, _POINTER)
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([InitParams], _POINTER),
    "ggml_free": ([_POINTER], None),
    "ggml_tensor_overhead": ([], _SIZE),
    "ggml_graph_overhead_custom": ([_SIZE, ctypes.c_bool], _SIZE),
    "ggml_new_tensor": ([_POINTER, _INT, _INT, ctypes.POINTER(_INT64)], _POINTER),
    "ggml_view_4d": ([_POINTER, _POINTER, *[_INT64] * 4, *[_SIZE] * 4], _POINTER),
    "ggml_permute": ([_POINTER, _POINTER, *[_INT] * 4], _POINTER),
    "ggml_glu": ([_POINTER, _POINTER, _INT, ctypes.c_bool], _POINTER),
    "ggml_glu_split": ([*[_POINTER] * 3, _INT], _POINTER),
    "ggml_rms_norm": ([_POINTER, _POINTER, _FLOAT], _POINTER),
    "ggml_mul": ([_POINTER] * 3, _POINTER),
    "ggml_add": ([_POINTER] * 3, _POINTER),
    "ggml_add_inplace": ([_POINTER] * 3, _POINTER),
    "ggml_reshape_4d": ([_POINTER, _POINTER, *[_INT64] * 4], _POINTER),
    "ggml_rope": ([*[_POINTER] * 3, _INT, _INT], _POINTER),
    "ggml_mul_mat": ([_POINTER] * 3, _POINTER),
    "ggml_mul_mat_id": ([_POINTER] * 4, _POINTER),
    "ggml_flash_attn_ext": ([*[_POINTER] * 5, *[_FLOAT] * 3], _POINTER),
    "ggml_flash_attn_ext_add_sinks": ([_POINTER, _POINTER], None),
    "ggml_new_graph_custom": ([_POINTER, _SIZE, ctypes.c_bool], _POINTER),
    "ggml_build_forward_expand": ([_POINTER, _POINTER], None),
    "ggml_backend_buft_alloc_buffer": ([_POINTER, _SIZE], _POINTER),
    "ggml_backend_buft_get_alloc_size": ([_POINTER, _POINTER], _SIZE),
    "ggml_backend_buffer_free": ([_POINTER], None),
    "ggml_backend_buffer_get_base": ([_POINTER], _POINTER),
    "ggml_backend_cpu_buffer_from_ptr": ([_POINTER, _SIZE], _POINTER),
    "ggml_backend_dev_backend_reg": ([_POINTER], _POINTER),
    "ggml_backend_dev_buffer_type": ([_POINTER], _POINTER),
    "ggml_backend_dev_init": ([_POINTER, ctypes.c_char_p], _POINTER),
    "ggml_backend_graph_compute": ([_POINTER, _POINTER], _INT),
    "ggml_backend_reg_get_proc_address": ([_POINTER, ctypes.c_char_p], _POINTER),
    "ggml_backend_tensor_alloc": ([_POINTER, _POINTER, _POINTER], _INT),
    "ggml_backend_tensor_get": ([_POINTER, _POINTER, _SIZE, _SIZE], None),
    "ggml_backend_tensor_memset": ([_POINTER, ctypes.c_uint8, _SIZE, _SIZE], None),
    "ggml_backend_tensor_set": ([_POINTER, _POINTER, _SIZE, _SIZE], None),
    "ggml_backend_view_init": ([_POINTER], _INT),
}


_CPU_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "ggml_backend_set_n_threads": ([_POINTER, _INT], None),
    "ggml_backend_cpu_set_use_ref": ([_POINTER, ctypes.c_bool], None),
    "ggml_pop_kernels": ([], ctypes.c_char_p),
    "ggml_backend_set_abort_callback": ([_POINTER, AbortCallback, _POINTER], None),
}
_WORK_SIZE: tuple[list[Any], Any] = ([_INT, _POINTER], _SIZE)


@functools.cache
def base() -> Any:
    """Return libggml-base with its functions declared."""
    api = bindings()
    from llama_cpp._ctypes_extensions import load_shared_library

    library = load_shared_library("ggml-base", api._base_path)
    for name, (argument_types, result_type) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, result_type
    return library


@dataclass(frozen=True)
class Cpu:
    """The CPU backend, its buffer type and functions."""

    backend: int
    buffer_type: int
    set_n_threads: Any
    set_use_ref: Any
    kernels: Any
    set_abort_callback: Any


@functools.cache
def cpu() -> Cpu:
    """Return the device, which is initialised once."""
    library = base()
    by_type = bindings()._ggml.ggml_backend_dev_by_type
    by_type.argtypes, by_type.restype = [_INT], _POINTER
    device = by_type(0)  # GGML_BACKEND_DEVICE_TYPE_CPU
    registry = library.ggml_backend_dev_backend_reg(device)

    def function(name: str) -> Any:
        address = library.ggml_backend_reg_get_proc_address(registry, name.encode())
        argument_types, result_type = _CPU_FUNCTIONS[name]
        return address and ctypes.CFUNCTYPE(result_type, *argument_types)(address)

    return Cpu(
        library.ggml_backend_dev_init(device, None),
        library.ggml_backend_dev_buffer_type(device),
        function("ggml_backend_set_n_threads"),
        function("ggml_backend_cpu_set_use_ref"),
        function("ggml_pop_kernels"),
        function("ggml_backend_set_abort_callback"),
    )


@functools.cache
def work_size() -> Any:
    """Return ggml_pop_work_size of the loaded CPU library (one of several variants)."""
    for path in sorted(Path(bindings()._base_path).glob("*ggml-cpu*")):
        try:
            library = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOLOAD", 0))
            function = library.ggml_pop_work_size
        except (AttributeError, OSError):
            continue
        function.argtypes, function.restype = _WORK_SIZE
        return function
    raise LookupError("the CPU's kernels are unpatched: ggml_pop_work_size is missing")


def tensor_at(address: int) -> Tensor:
    return Tensor.from_address(address)


def set_params(tensor: int, first: int, values: bytes) -> None:
    """Write to a tensor's op_params from 32-bit word `first` on."""
    ctypes.memmove(tensor + Tensor.op_params.offset + 4 * first, values, len(values))


def guarded_pages(size: int) -> tuple[int, Any]:
    """Return the address of pages in front of an inaccessible page, and their owner.

    `size`: bytes, a multiple of the page size.
    """
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    last = ctypes.c_void_p(start + size)
    if ctypes.CDLL(None).mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("mprotect")
    return start, pages
