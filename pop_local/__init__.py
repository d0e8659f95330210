"""Prefill-only pruning for GGUF models on the user's own machine."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# The stub file has one line for each public name: from MODULE import NAME as NAME.
_STUB = Path(__file__).with_suffix(".pyi").read_text("utf-8")
_IMPORTS = [line.split() for line in _STUB.splitlines() if line.startswith("from ")]
_MODULES = {name: module for _, module, _, name, *_ in _IMPORTS}
__all__ = ["__version__", *_MODULES]


# Names are imported on first access, so that the commands' --help does not load llama.cpp.
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
