"""Open and read model files with llama.cpp in a child process, which they may crash."""

import json
import os
from contextlib import suppress
from pathlib import Path

from pop_base.errors import PopError
from pop_local.engine.limited.process import KeptProcess
from pop_local.engine.llama import logs
from pop_local.workflows.inspect import inspect
from support.calls import greedy, opened

TEXT = "The ferry leaves the pier at half past six, with nobody on board. "


class Loader:
    """Opens files in a child process, which is reused until a file crashes it."""

    def __init__(self, patience_s: float, limit_bytes: int = 4 << 30) -> None:
        self._child = KeptProcess(Work, limit_s=patience_s, limit_bytes=limit_bytes)
        self.children: set[int] = set()

    def read(self, path: Path, sidecar: Path | None = None) -> str:
        """Inspect, open, tokenize, prefill with pruning and sample a token.

        Returns "" or the user's message. Raises PopError for a crash, another exception, or if a
        limit of time or memory is exceeded.
        """
        self.children.add(self._child.start().pid)
        said: str = self._child.call("read", str(path), sidecar and str(sidecar))
        if said.startswith("llama.cpp aborted"):
            self.close()
        return said

    def close(self) -> None:
        self._child.close()


class Work:
    def __init__(self) -> None:
        stdout = os.dup(1)

        def tell(reason: str) -> None:
            os.write(
                stdout, json.dumps({"result": f"llama.cpp aborted: {reason}"}).encode() + b"\n"
            )

        logs.on_abort = tell

    def read(self, path: str, sidecar: str | None) -> str:
        sidecar_path = None if sidecar is None else Path(sidecar)
        with suppress(PopError):  # inspect relies on llama.cpp's graph
            inspect(path, sidecar_path)
        try:
            with opened(Path(path), sidecar=sidecar_path, n_ctx=64) as model:
                tokens = model.engine.context.vocabulary.tokenize(TEXT, special=True)[:48]
                model.engine.context.vocabulary.detokenize(greedy(model, tokens, 1))
        except PopError as error:
            return error.message or "refused"
        return ""
