"""A model quantised further by llama.cpp (llama_model_quantize), in a process that can be ended."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pop_local.base.errors import PopError, StoppedError
from pop_local.engine.llama import logs
from pop_local.engine.llama.backend import bindings

# enum llama_ftype of llama.h, from small losses to large ones.
TYPES = {"Q4_0": 2, "Q3_K_M": 12, "Q2_K": 10}
_POLL_S = 0.2
# `python -m` would look for modules in the current folder.
_START = (
    "import sys; sys.path[:] = {path}; from {module} import main; sys.exit(main(*sys.argv[1:]))"
)


def quantise(
    source: Path, target: Path, name: str, n_threads: int, should_stop: Callable[[], bool]
) -> None:
    """Write `source` to `target` in one of TYPES, whatever its type is now.

    Raises PopError when llama.cpp refuses it, and StoppedError; `target` may be unfinished then.
    """
    start = _START.format(path=[*filter(None, sys.path)], module=__name__)
    given = [str(source), str(target), name, str(n_threads)]
    words = [sys.executable, "-I", "-c", start, *given]
    # Ctrl-C is for the caller, who ends it.
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            while process.poll() is None:
                if should_stop():
                    raise StoppedError
                time.sleep(_POLL_S)
        finally:
            process.kill()
        assert process.stderr is not None
        said = process.stderr.read().strip().splitlines()
    if process.returncode:
        why = said[-1] if said else f"code {process.returncode}"
        raise PopError(
            f"{source} could not be quantised as {name}: {why}",
            "it takes a model that llama.cpp can quantise, and room for a copy where temporary"
            " files go (TMPDIR)",
        )


def main(source: str, target: str, name: str, n_threads: str) -> int:
    api = bindings()
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = TYPES[name], int(n_threads)
    settings.allow_requantize = True
    code: int = api.llama_model_quantize(source.encode(), target.encode(), settings)
    if code:
        print(logs.first_error() or f"llama.cpp says {code}", file=sys.stderr)
    return code
