"""llama.cpp without our kernels, measured in a process of its own.

The layout of weights in memory is fixed as they are loaded, for the kernels of that process. So
llama.cpp's best cannot be measured in a process that has ours.
"""

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pop_local.base.errors import PopError
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.speed import Run, run

if TYPE_CHECKING:
    from typing_extensions import Self

_opened: PopModel  # in the child


class Upstream:
    """A model that llama.cpp reads in full, by its own kernels.

    `options` are PopModel's. Whatever its process raises is raised by `run`.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self._loaded = self._pool.submit(_open, path, options)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, tokens: Sequence[int]) -> Run:
        """As `speed.run`, of the full model. Raises PopError where the process has ended."""
        try:
            self._loaded.result()
            return self._pool.submit(_run, tokens).result()
        except BrokenProcessPool as error:
            raise PopError(
                "the process that runs llama.cpp by itself ended",
                "is there memory for the model twice?",
            ) from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _open(path: Path, options: dict[str, Any]) -> None:
    global _opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever measures ends it
    os.environ["GGML_POP_KERNELS"] = "0"  # which is read as the first model is loaded
    _opened = PopModel(path, kernels=False, **options)


def _run(tokens: Sequence[int]) -> Run:
    return run(_opened, Mode.OFF, tokens)
