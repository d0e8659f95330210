"""Compile the AVX-512 kernel for few columns with chosen instructions, and call it.

The library's build has the instructions of the local processor, so it contains only one branch of
each `#if` in the kernel. Wheels have the other branches, too.
"""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np

from pop_build.tree import recipe
from support.ggml import MulMat
from support.paths import PACKAGE, ROOT
from support.recipes import llama_cpp_files

_WRAPPER = Path(__file__).with_suffix(".cpp")
_KERNELS = ROOT / "patches/llama.cpp/ggml/src/ggml-cpu"
_HEADERS = ("ggml/include", "ggml/src")
# Every processor with AVX512_VNNI supports these instructions.
_REQUIRED = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile the kernel with further instructions (`flags`), and load it."""
    for inside, content in llama_cpp_files(recipe(PACKAGE, {})):
        if inside.suffix == ".h" and str(inside.parent) in _HEADERS:
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content())
    included = [f"-I{folder / each}" for each in _HEADERS] + [f"-I{_KERNELS}"]
    library = folder / "gemv.so"
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += [*_REQUIRED.split(), *flags, *included, "-o", str(library)]
    sources = [str(_WRAPPER), str(_KERNELS / "fast/gemv-512.cpp")]
    subprocess.run([*command, *sources], check=True)
    return ctypes.CDLL(str(library))


def multiply(kernel: ctypes.CDLL, op: MulMat) -> np.ndarray:
    """Return the product, float32 [n_rows, n_out]."""
    weights = np.ascontiguousarray(op.weights.data)
    x = np.ascontiguousarray(op.x, np.float32)
    n_out, stride = weights.shape
    out = np.full((len(x), n_out), np.nan, np.float32)
    done = kernel.multiply(
        ctypes.c_int(int(op.weights.type)),
        ctypes.c_void_p(weights.ctypes.data),
        ctypes.c_size_t(stride),
        ctypes.c_int(n_out),
        ctypes.c_int(x.shape[1] // 32),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_int(len(x)),
        ctypes.c_void_p(out.ctypes.data),
    )
    assert done, f"the kernel does not support {op.weights.type.name}"
    return out
