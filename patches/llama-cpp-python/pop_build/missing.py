"""List the packages that a failed GPU build needs, because CMake's errors do not name them."""

import ctypes
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from .errors import BuildError
from .tree import PORTABLE_VARIABLE

# Required entries of CMakeCache.txt by ggml option, and the packages that provide them.
_REQUIRED = {
    "GGML_CUDA": {
        "CUDAToolkit_NVCC_EXECUTABLE": "nvcc from the CUDA toolkit (on PATH or in CUDACXX)",
        "CUDA_cublas_LIBRARY": "cuBLAS and its headers (libcublas-dev-...)",
        "CUDA_cuda_driver_LIBRARY": "the driver stub library libcuda.so (cuda-driver-dev-...; not"
        " required with -DGGML_CUDA_NO_VMM=ON in CMAKE_ARGS)",
    },
    "GGML_VULKAN": {
        "Vulkan_INCLUDE_DIR": "Vulkan's headers (libvulkan-dev)",
        "Vulkan_LIBRARY": "Vulkan's loader (libvulkan-dev)",
        "Vulkan_GLSLC_EXECUTABLE": "the GLSL shader compiler (glslc)",
        "SPIRV-Headers_DIR": "SPIR-V's headers (spirv-headers)",
    },
}
_ENTRY = re.compile(r"^([^#/:\n]+):\w+=(.*)$", re.MULTILINE)
_DEFINE = re.compile(r"-D\s*(\w+)(?::\w+)?=(\S+)")
_ARCHITECTURES = {"CMAKE_CUDA_ARCHITECTURES", "GGML_NATIVE"}
_ON = ("1", "on", "true", "yes", "y")


def explain(cache: Path) -> None:
    """Raise BuildError if CMake's cache shows that a dependency is missing."""
    text = cache.read_text(encoding="utf-8") if cache.is_file() else ""
    entries: dict[str, str] = dict(_ENTRY.findall(text))

    def is_on(option: str) -> bool:
        return entries.get(option, "").lower() in _ON

    for option, required in _REQUIRED.items():
        packages = [
            package
            for name, package in required.items()
            if entries.get(name, "").endswith("NOTFOUND")
            and not (name == "CUDA_cuda_driver_LIBRARY" and is_on("GGML_CUDA_NO_VMM"))
        ]
        if is_on(option) and packages:
            raise BuildError(
                f"CMake did not find these dependencies of {option}: {'; '.join(packages)}.",
                "Install the dependencies (Debian and NVIDIA package names are in parentheses)"
                " and build again. To build for the CPU, unset CMAKE_ARGS.",
            )


def check_architecture(env: Mapping[str, str]) -> None:
    """Raise BuildError if the target GPU of a CUDA build is unknown.

    If no target is set, nvcc compiles for the oldest architecture that it supports. nvcc prints a
    warning, but pip hides it.
    """
    definitions = {
        name: value.lower() for name, value in _DEFINE.findall(env.get("CMAKE_ARGS", ""))
    }
    # A portable build covers every architecture.
    is_named = bool(
        {"CUDAARCHS", PORTABLE_VARIABLE} & env.keys() or definitions.keys() & _ARCHITECTURES
    )
    if definitions.get("GGML_CUDA") in _ON and not is_named and not _sees_gpu():
        raise BuildError(
            "No NVIDIA GPU is visible, so the target GPU of the CUDA build is unknown.",
            "Set CUDAARCHS to 80 (A100), 86 (RTX 30), 89 (RTX 40), 90 (H100), or 120 (RTX 50)."
            " To build for all GPUs, which takes a long time, add -DGGML_NATIVE=OFF to CMAKE_ARGS.",
        )


def _sees_gpu() -> bool:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)
