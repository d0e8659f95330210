"""Compile the tables of operations that upstream's CUDA and Metal backends support.

The tables are functions of the pinned release's sources. They depend on neither toolkit, so they
compile on every machine with a C++ compiler.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pop_build.tree import recipe
from pop_local.engine.llama.backend import bindings
from support.paths import PACKAGE
from support.recipes import llama_cpp_files

_PROGRAM = Path(__file__).with_suffix(".cpp")
_HEADERS = ("ggml/include", "ggml/src")
# Functions by source file, in the order in which they are compiled.
_TABLES = {
    "ggml/src/ggml-cuda/ggml-cuda.cu": ("ggml_backend_cuda_device_supports_op",),
    "ggml/src/ggml-metal/ggml-metal-common.cpp": ("ggml_metal_op_mul_mat_use_mm",),
    "ggml/src/ggml-metal/ggml-metal-device.m": (
        "ggml_metal_supports_mul_mat_op",
        "ggml_metal_device_supports_op",
    ),
}


@dataclass(frozen=True)
class Node:
    """A node that our hooks add, and the backends that support it."""

    name: str
    operation: str
    cuda: bool
    metal: bool
    metal_without_bf16: bool


def nodes(folder: Path) -> tuple[Node, ...]:
    """Compile the program into a folder, run it, and return its answers."""
    sources: dict[str, str] = {}
    for inside, content in llama_cpp_files(recipe(PACKAGE, {})):
        name = inside.as_posix()
        if inside.suffix == ".h" and str(inside.parent) in _HEADERS:
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content())
        elif name in _TABLES:
            sources[name] = content().decode()
    tables = [
        function(sources[name], each) for name, functions in _TABLES.items() for each in functions
    ]
    text = _PROGRAM.read_text(encoding="utf-8").replace("//TABLES//", "\n".join(tables))
    (folder / "tables.cpp").write_text(text, encoding="utf-8")
    library = Path(bindings()._lib._name).parent
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-w", "-o", "tables"]
    command += [
        *(f"-I{folder}" for folder in _HEADERS),
        "tables.cpp",
        f"-L{library}",
        "-lggml-base",
    ]
    command += [f"-Wl,-rpath,{library}"]
    subprocess.run(command, cwd=folder, check=True)
    run = subprocess.run([folder / "tables"], capture_output=True, text=True, check=True)
    return tuple(_node(line.split("\t")) for line in run.stdout.splitlines())


def function(source: str, name: str) -> str:
    """Return a C function's text up to the brace in the first column."""
    pattern = rf"^(?:static )?bool {name}\(.*?^}}$"
    match = re.search(pattern, source, re.MULTILINE | re.DOTALL)
    if match is None:
        raise AssertionError(f"upstream has no function {name}: update tests/support/gpu_tables.py")
    return match[0]


def _node(fields: list[str]) -> Node:
    name, operation, *answers = fields
    cuda, metal, metal_without_bf16 = (answer == "1" for answer in answers)
    return Node(name, operation, cuda, metal, metal_without_bf16)
