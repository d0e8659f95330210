"""A model's file of sums. Several processes add their sums to it under a lock.

The file contains sums of products over thousands of rows, but no single row or token. Only the
folder's owner can read the folder (docs/learning.md).
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from pop_converter.base.errors import DAMAGED_ARCHIVE, PopError, WriteError
from pop_converter.base.output_file import make_private, replacing
from pop_converter.fit.wide import WideInput
from pop_converter.gguf.source import Source, sampled_sha256
from pop_converter.projection import Projection
from pop_local.engine.learning.sums import Sums, stored_inputs
from pop_local.models.sidecars import LearnedFiles

log = logging.getLogger("pop_local.learning")

T = TypeVar("T")
_VERSION = 1


@dataclass(frozen=True)
class Known:
    """The header of a file of sums, and the wider inputs of each boundary."""

    head: Any
    wides: dict[int, WideInput]

    @property
    def n_rows(self) -> dict[int, int]:
        return {boundary: n_rows for boundary, _, n_rows in self.head["grams"]}

    @property
    def kinds(self) -> dict[int, list[str]]:
        return {int(boundary): kinds for boundary, kinds in self.head.get("kinds", {}).items()}

    def is_own(self, boundary: int) -> bool:
        """Return True if the boundary's sums started without a fit, so any kind can be fitted."""
        return len(self.kinds.get(boundary, ())) > 1


@dataclass(frozen=True)
class SumsFile:
    """A model's file of sums. `model`: the model's hash."""

    path: Path
    model: str

    @classmethod
    def of(cls, source: Source) -> "SumsFile":
        """Return a model's file of sums, which may not exist yet."""
        return cls(LearnedFiles.of(source).sums, sampled_sha256(source))

    def load(self) -> Sums:
        """Return the stored sums, empty without a file. A damaged file is renamed to *.damaged."""
        return self._read(Sums.of) or Sums()

    def known(self) -> Known:
        """Return the header and the wider inputs without loading the sums."""
        found = self._read(lambda head, arrays: Known(head, stored_inputs(head, arrays)))
        return found or Known({"grams": []}, {})

    def _read(self, take: Callable[[Any, Any], T]) -> T | None:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                if (head["version"], head["model"]) == (_VERSION, self.model):
                    return take(head, arrays)
                log.warning("%s belongs to another model or version; learning restarts", self.path)
        except FileNotFoundError:
            return None
        except DAMAGED_ARCHIVE as error:
            # After a system error, which has an errno, the file may be intact. Errors from numpy
            # have no errno.
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise PopError(f"{self.path} cannot be read now: {error}") from error
            log.warning("%s is damaged; learning restarts: %s", self.path, error)
        with suppress(OSError):
            self.path.replace(self.path.with_suffix(".damaged"))
        return None

    def rows(self) -> dict[int, int]:
        """Return each boundary's row count in any model's file, or {} if the file is unreadable."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                head = json.loads(str(arrays["head"]))
                return {int(boundary): int(n_rows) for boundary, _, n_rows in head["grams"]}
        except DAMAGED_ARCHIVE:
            return {}

    def add(self, sums: Sums, kinds: dict[int, list[Projection]]) -> None:
        """Add sums for some projection kinds to the file. Raises PopError if writing fails.

        If the file has a different wider input for a boundary, the boundary's new sums are dropped,
        because sums over different inputs cannot be added.
        """
        try:
            make_private(self.path.parent)
            with FileLock(self.path.with_suffix(".lock")):
                self._add(sums, kinds)
        except OSError as error:
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error

    def _add(self, sums: Sums, kinds: dict[int, list[Projection]]) -> None:
        every = self.load()
        for boundary, gram in sums.grams.items():
            if boundary not in every.grams:
                every.grams[boundary] = gram
                if boundary in sums.wides:
                    every.wides[boundary] = sums.wides[boundary]
            elif every.has_same_input(sums, boundary):
                every.grams[boundary].merge(gram)
        head, arrays = every.arrays()
        known = self.known().kinds
        named = {str(each): known.get(each) or kinds.get(each, []) for each in every.grams}
        head |= {"version": _VERSION, "model": self.model, "kinds": named}
        with replacing(self.path, force=True) as file:
            with suppress(OSError):
                Path(file.name).chmod(0o600)
            np.savez(file, head=json.dumps(head), **arrays)
