"""Make file operations below a folder fail, one at a time: write, rename, create, list."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# A pseudo error number: half of the data is written.
SHORT = 0
# Operations whose first argument is a path; those on a file descriptor affect any file.
_BY_PATH = (
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "chmod",
    "listdir",
    "scandir",
)
_BY_DESCRIPTOR = ("fsync", "fchmod", "ftruncate")


@dataclass
class Fault:
    """Makes operation number `at` (from 0) fail with `number`; `hit` then names the operation."""

    folder: Path
    at: int
    number: int
    hit: str = ""
    n_seen: int = 0

    def has(self, path: Any) -> bool:
        """Return whether a path is the folder or inside it."""
        return Path(os.fsdecode(path)).is_relative_to(self.folder)

    def passes(self, name: str, path: Any) -> bool:
        """Count an operation and return False if only half of it must happen. Raise OSError."""
        is_ours = isinstance(path, int) or self.has(path)
        if not is_ours or (self.number == SHORT and name != "write"):
            return True
        self.n_seen += 1
        if self.n_seen != self.at + 1:
            return True
        self.hit = name
        if self.number != SHORT:
            raise OSError(self.number, os.strerror(self.number), path)
        return False


class _File(io.FileIO):
    fault: Fault

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        whole = memoryview(data).cast("B")
        passes = self.fault.passes("write", self.name)
        return super().write(whole if passes else whole[: (len(whole) + 1) // 2])

    def truncate(self, size: int | None = None) -> int:
        self.fault.passes("truncate", self.name)
        return super().truncate(size)


@contextmanager
def failing(folder: Path, at: int, number: int) -> Iterator[Fault]:
    """Make one operation inside `folder` fail once, with an `errno` or SHORT."""
    fault, real_open = Fault(folder, at, number), io.open
    file_class = type("_FaultyFile", (_File,), {"fault": fault})

    def opened(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        writes = bool(set(mode) & set("wxa+"))
        # A file with an opener has no name: it only tests whether the folder is writable.
        if not writes or isinstance(file, int) or "opener" in options or not fault.has(file):
            return real_open(file, mode, buffering, *text, **options)
        fault.passes("open", file)
        raw = file_class(os.fspath(file), mode.translate({ord("b"): None, ord("t"): None}))
        if buffering == 0:
            return raw
        whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return whole if "b" in mode else io.TextIOWrapper(whole, *text, **options)

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *more: Any, **options: Any) -> Any:
            fault.passes(name, first)
            return real(first, *more, **options)

        return call

    names = [name for name in (*_BY_PATH, *_BY_DESCRIPTOR) if hasattr(os, name)]
    changed: dict[str, Any] = {name: counted(name, getattr(os, name)) for name in names}
    with mock.patch.multiple(os, **changed), mock.patch.multiple(io, open=opened):
        yield fault


FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EINTR": errno.EINTR, "short": SHORT}
