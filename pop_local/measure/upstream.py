"""llama.cpp without our kernels, measured in a process of its own.

The layout of weights in memory is fixed as they are loaded, for the kernels of that process. So
llama.cpp's best cannot be measured in a process that has ours.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pop_local.base.errors import PopError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import Run, run

_opened: PopModel  # in the child


@contextmanager
def upstream(path: Path, **options: Any) -> Iterator[Callable[[Prompt], Run]]:
    """Give what reads a prompt in full by llama.cpp's own kernels, as `speed.run` does.

    `options` are PopModel's. Whatever the process raises is raised then; PopError where it has
    ended.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        loaded = pool.submit(_open, path, options)

        def read(prompt: Prompt) -> Run:
            try:
                loaded.result()
                return pool.submit(_run, prompt).result()
            except BrokenProcessPool as error:
                raise PopError(
                    "the process that runs llama.cpp by itself ended",
                    "is there memory for the model twice?",
                ) from error

        yield read


def _open(path: Path, options: dict[str, Any]) -> None:
    global _opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever measures ends it
    os.environ["GGML_POP_KERNELS"] = "0"  # which is read as the first model is loaded
    _opened = PopModel(path, kernels=False, **options)


def _run(prompt: Prompt) -> Run:
    return run(_opened, Mode.OFF, prompt)
