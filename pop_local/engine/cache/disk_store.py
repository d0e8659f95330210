"""Store saved states on disk so that they survive a restart.

Each state is a zip file (see saved_state.py) with mode 0600. The file name is a hash of the state's
key and tokens. If the files exceed the capacity, the least recently used files are removed.
Multiple processes may share the folder. Every process detects added and removed files.
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pop_base.errors import PopError
from pop_base.output_file import make_private, remove_leftovers, replacing
from pop_local.engine.cache.saved_state import (
    DAMAGES,
    CountReusable,
    SavedState,
    add_member,
    decoded_array,
    members,
    read_member,
    read_state,
)
from pop_local.engine.llama import backend

_FORMAT = 1
SUFFIX = ".popstate"
_ABOUT = "state.json"
_MOST_ABOUT_BYTES = 2**20
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredState:
    """A stored state's description, without the cells."""

    path: Path
    size_bytes: int
    prompts_key: str
    key: str
    model: str
    tokens: np.ndarray
    images: dict[int, str]


def clear_folder(folder: Path) -> int:
    """Remove a folder's states and temporary files. Return the number of states removed."""
    remove_leftovers(folder)
    files = list(folder.glob(f"*{SUFFIX}"))
    for path in files:
        with suppress(OSError):
            path.unlink()
    return len(files)


class DiskStore:
    """Stores up to `capacity_bytes` of states in a folder. A background thread writes the files."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        """Create the folder. Raises PopError on failure."""
        self.folder, self.capacity_bytes = folder, capacity_bytes
        # Another version of llama.cpp may compute different K/V.
        self._format = f"{_FORMAT}, {backend.version()} abi {backend.library_abi()}"
        self._known: dict[Path, StoredState] = {}
        self._writer = ThreadPoolExecutor(1, "pop-local disk store")
        try:
            make_private(folder)
            remove_leftovers(folder)
        except OSError as error:
            raise PopError(
                f"cannot create {folder}: {error.strerror}", "check its permissions"
            ) from error

    def add(self, prompts_key: str, state: SavedState) -> None:
        """Write a state in the background. Failed writes are logged."""
        if len(state.cells) <= self.capacity_bytes:
            self._writer.submit(self._write, prompts_key, state)

    def close(self) -> None:
        """Wait until all states are written."""
        self._writer.shutdown()

    def stored(self) -> list[StoredState]:
        """Return the readable states, least recently used first, and remove all other files."""
        states: dict[Path, StoredState] = {}
        for path, status in self._files():
            state = self._known.get(path)
            if state is None or state.size_bytes != status.st_size:
                state = self._open(path, status)
            if state is not None:
                states[path] = state
        self._known = states  # a single assignment, because several threads read it
        return list(states.values())

    def find(self, key: str, count: CountReusable, n_least: int) -> SavedState | None:
        """Return the state with the most reusable rows if it has more than `n_least` such rows."""
        best, n_best = None, n_least
        for state in self.stored():
            if state.prompts_key == key and (n := count(state.tokens, state.images)) > n_best:
                best, n_best = state, n
        return None if best is None else self._load(best)

    def _load(self, stored: StoredState) -> SavedState | None:
        """Read a state and mark it as used. If the file is damaged, remove it and return None."""

        def read(archive: zipfile.ZipFile) -> SavedState:
            n_tokens = len(stored.tokens)
            return read_state(archive, stored.key, stored.model, stored.images, n_tokens)

        state = self._read(stored.path, read)
        if state is not None:
            with suppress(OSError):  # another process may remove the file
                os.utime(stored.path)
        return state

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Return the state files and their stat results, least recently used first."""
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                files.append((path, path.stat()))
        return sorted(files, key=lambda file: file[1].st_mtime_ns)

    def _open(self, path: Path, status: os.stat_result) -> StoredState | None:
        def read(archive: zipfile.ZipFile) -> StoredState:
            tokens = read_member(archive, "tokens.npy")
            about = json.loads(read_member(archive, _ABOUT, _MOST_ABOUT_BYTES))
            if about["format"] != self._format:
                raise ValueError(f"unknown format {about['format']}")
            return StoredState(
                path=path,
                size_bytes=status.st_size,
                prompts_key=str(about["prompts_key"]),
                key=str(about["key"]),
                model=str(about["model"]),
                tokens=decoded_array(tokens, np.int32, int(about["n_tokens"])),
                images={int(row): str(key) for row, key in about["images"]},
            )

        return self._read(path, read)

    def _write(self, prompts_key: str, state: SavedState) -> None:
        about = {
            "format": self._format,
            "prompts_key": prompts_key,
            "key": state.key,
            "model": state.model,
            "n_tokens": state.n_tokens,
            "images": sorted(state.images.items()),
        }
        path = self._path(prompts_key, state)
        try:
            if path.exists():
                os.utime(path)
                return
            with replacing(path, force=True) as file:
                if hasattr(os, "fchmod"):  # prompts are private
                    os.fchmod(file.fileno(), 0o600)
                with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                    add_member(archive, _ABOUT, json.dumps(about).encode())
                    for name, content in members(state):
                        add_member(archive, name, content)
            self._evict(path, prompts_key, state)
        except (PopError, OSError) as error:
            log.warning("cannot store a prompt's KV cache: %s", error)

    def _path(self, prompts_key: str, state: SavedState) -> Path:
        named = [prompts_key, state.key, sorted(state.images.items()), state.first_stale]
        digest = hashlib.sha256(json.dumps(named).encode())
        for array in (state.tokens, state.is_full):
            digest.update(array.tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}{SUFFIX}"

    def _evict(self, newest_path: Path, prompts_key: str, newest: SavedState) -> None:
        """Remove states that `newest` extends. If space is short, remove the oldest states, too."""
        for state in self.stored():
            is_extended = newest.extends(state.tokens, state.images)
            if state.path != newest_path and state.prompts_key == prompts_key and is_extended:
                state.path.unlink(missing_ok=True)
        files = self._files()
        n_bytes = sum(status.st_size for _, status in files)
        for path, status in files:
            if n_bytes <= self.capacity_bytes:
                break
            path.unlink(missing_ok=True)
            n_bytes -= status.st_size

    def _read(self, path: Path, read: Callable[[zipfile.ZipFile], T]) -> T | None:
        """Return the result of `read`, or None if the file is missing or unreadable."""
        try:
            with zipfile.ZipFile(path) as archive:
                return read(archive)
        except FileNotFoundError:  # another process removed it
            return None
        except (OSError, TypeError, *DAMAGES) as error:
            log.warning("removed the unreadable cache file %s: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
