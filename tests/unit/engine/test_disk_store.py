"""The store of KV caches on disk: reading after a restart, and safe from damage and full disks."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pop_base import output_file
from pop_base.errors import PopError, WriteError
from pop_local.engine.cache import disk_store
from pop_local.engine.cache.disk_store import DiskStore, clear_folder
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_state import decoded_array
from pop_local.engine.prompt.prompt import Prompt
from support.calls import first_of, kv_bytes, last_logits, opened, prompt, read
from support.converted import tiny

OLD, OTHER = prompt(600), prompt(500, seed=5)
ROOM = 2**26


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "states"


def store_prompt(pop_file: Path, folder: Path, tokens=OLD, capacity_bytes=ROOM) -> bytes:
    """Read a prompt, store its state on disk, and return its cells."""
    prompts = PromptCache(ROOM, DiskStore(folder, capacity_bytes))
    with opened(pop_file, prompt_cache=prompts) as model:
        read(model, tokens)
        first_of(model).states.store()
        prompts.close()
        return kv_bytes(model)


def restart(pop_file: Path, folder: Path, tokens=OLD, **options):
    """Read a prompt in a new engine; return the reading, the logits and the cells."""
    prompts = PromptCache(ROOM, DiskStore(folder, ROOM))
    with opened(pop_file, prompt_cache=prompts, **options) as model:
        reading = model.read(Prompt(tokens))
        return reading, last_logits(model), kv_bytes(model)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def test_prompt_is_restored_after_restart(pop_file, folder):
    longer = [*OLD, 5, 6]
    cells = store_prompt(pop_file, folder)
    reading, logits, restored = restart(pop_file, folder, longer)
    assert reading.n_cached == len(OLD)
    with opened(pop_file) as model:
        read(model, OLD)
        assert kv_bytes(model) == cells
        np.testing.assert_array_equal(read(model, longer), logits)
        assert kv_bytes(model) == restored


def test_edited_prompt_is_restored_after_restart(pop_file, folder):
    store_prompt(pop_file, folder)
    reading, *_ = restart(pop_file, folder, [*OLD[:40], 9, 9, *OLD[42:]])
    assert reading.n_stale > 500


def test_files_are_private(pop_file, folder):
    store_prompt(pop_file, folder)
    [path] = files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_least_recently_used_states_are_removed(pop_file, folder):
    store_prompt(pop_file, folder)
    [first] = files(folder)
    store_prompt(pop_file, folder, OTHER)
    room = sum(path.stat().st_size for path in files(folder)) + 1000
    os.utime(first, (1, 1))
    store_prompt(pop_file, folder, prompt(400, seed=6), room)
    assert first not in files(folder)
    assert len(files(folder)) == 2
    assert sum(path.stat().st_size for path in files(folder)) <= room


def test_state_above_the_capacity_is_not_written(pop_file, folder):
    store_prompt(pop_file, folder, capacity_bytes=1000)
    assert files(folder) == []


def test_longer_prompt_replaces_its_prefix(pop_file, folder):
    store_prompt(pop_file, folder)
    store_prompt(pop_file, folder, [*OLD, *OTHER[:50]])
    assert len(files(folder)) == 1


def flipped(content: bytes, where: float) -> bytes:
    at = int(where * len(content))
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


DAMAGES: list[Callable[[bytes], bytes]] = [
    *(partial(flipped, where=where) for where in (0.1, 0.5, 0.999)),
    *(lambda _, content=content: content for content in (b"", b"PK\x03\x04 half", b"text" * 100)),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_removes_damaged_file_with_one_line(pop_file, folder, damage, caplog):
    store_prompt(pop_file, folder)
    [path] = files(folder)
    path.write_bytes(damage(path.read_bytes()))
    (folder / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING, logger=disk_store.__name__):
        reading, logits, _ = restart(pop_file, folder)
    assert reading.n_cached == 0
    assert [file.name for file in files(folder)] == ["notes.txt"]
    assert len(caplog.messages) == 1
    assert path.name in caplog.messages[0]
    np.testing.assert_array_equal(logits, restart(pop_file, folder)[1])


def test_state_of_another_version_is_removed(pop_file, folder, monkeypatch):
    store_prompt(pop_file, folder)
    monkeypatch.setattr(disk_store, "_FORMAT", 0)
    assert restart(pop_file, folder)[0].n_cached == 0
    assert files(folder) == []


def test_state_of_another_model_is_kept_but_unused(pop_file, folder, tmp_path):
    store_prompt(pop_file, folder)
    other = tiny(tmp_path, seed=3)
    assert restart(other, folder)[0].n_cached == 0
    assert len(files(folder)) == 1


def test_full_disk_is_logged_in_one_line(pop_file, folder, monkeypatch, caplog):
    def full(*_: object, **__: object) -> None:
        raise WriteError("cannot write: no space left on device")

    monkeypatch.setattr(disk_store, "replacing", full)
    with caplog.at_level(logging.WARNING, logger=disk_store.__name__):
        store_prompt(pop_file, folder)
    assert files(folder) == []
    assert caplog.messages == [
        "cannot store a prompt's KV cache: cannot write: no space left on device"
    ]


WRITER = """
import sys, threading
from pathlib import Path
import numpy as np
from pop_local.engine.cache.disk_store import DiskStore
from pop_local.engine.cache.saved_state import SavedState
n = 1000
state = SavedState("key", "model", np.arange(n, dtype=np.int32), np.ones(n, bool),
                   np.arange(n + 1, dtype=np.int32), bytes(2**27))
store = DiskStore(Path(sys.argv[1]), 2**30)
print("ready", flush=True)
while True:
    store.add("prompts", state)
    store.close()
    for path in store.folder.glob("*.popstate"):
        path.unlink()
    store = DiskStore(store.folder, 2**30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.13, 0.3])
def test_killed_process_leaves_no_partial_state(folder, after_s, caplog):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
    store = DiskStore(folder, 2**30)
    for stored in store.stored():
        assert store.find(stored.prompts_key, lambda *_: 1, 0) is not None
    assert caplog.messages == []
    assert [path for path in files(folder) if path.suffix == output_file._SUFFIX] == []


def test_two_processes_share_a_folder(pop_file, folder):
    here = DiskStore(folder, ROOM)
    assert here.stored() == []
    store_prompt(pop_file, folder)
    [stored] = here.stored()
    assert stored.tokens.tolist() == OLD
    stored.path.unlink()
    assert here.find(stored.prompts_key, lambda *_: 1, 0) is None


def test_clear_removes_all_states(pop_file, folder):
    store_prompt(pop_file, folder)
    assert clear_folder(folder) == 1
    assert files(folder) == []


def test_nothing_is_written_without_a_store(pop_file, folder):
    prompts = PromptCache(ROOM)
    with opened(pop_file, prompt_cache=prompts) as model:
        read(model, OLD)
        first_of(model).states.store()
    prompts.close()
    assert not folder.exists()


def test_state_that_reuses_fewer_rows_than_the_cache_stays_on_disk(pop_file, folder):
    store_prompt(pop_file, folder, OLD[:50] + OTHER)
    [path] = files(folder)
    prompts = PromptCache(ROOM, DiskStore(folder, ROOM))
    with opened(pop_file, prompt_cache=prompts) as model:
        read(model, OLD)
        os.utime(path, ns=(0, 0))
        assert model.read(Prompt([*OLD, 5, 6])).n_cached == len(OLD)
    assert path.stat().st_mtime_ns == 0, "it was loaded"


@pytest.mark.parametrize(
    "changes",
    [
        {"first_stale": -1},
        {"first_stale": 10},
        {"positions": np.arange(1, len(OLD) + 2, dtype=np.int32)},
        {"tokens": np.full(len(OLD), -2, np.int32)},
    ],
)
def test_file_with_impossible_rows_is_removed(pop_file, folder, changes):
    with opened(pop_file, full=True) as model:
        read(model, OLD)
        state = replace(first_of(model).states.save(), **changes)
        key = first_of(model).states._prompts_key
    store = DiskStore(folder, ROOM)
    store.add(key, state)
    store.close()
    assert store.find(key, lambda tokens, images: len(tokens), 0) is None
    assert not files(folder)


@pytest.mark.parametrize("cells", ["empty", "cut", "of fewer rows", "of 4 GB"])
def test_rejects_state_with_invalid_cells(pop_file, cells):
    with opened(pop_file) as model:
        read(model, OLD)
        state = first_of(model).states.save()
        first_of(model).cache.truncate(10)
        content = {
            "empty": b"",
            "cut": state.cells[:-1],
            "of fewer rows": first_of(model).states.save().cells,
            "of 4 GB": b"\xff" * 4 + state.cells[4:],
        }[cells]
        with pytest.raises(PopError, match="the saved state does not match"):
            first_of(model).states.restore(replace(state, cells=content))
        assert first_of(model).cache.n_tokens == 0


def npy(head: str, data: bytes = b"") -> bytes:
    padded = head.ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(padded).to_bytes(2, "little") + padded.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (999999999999,), }"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (10,), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10,), }", bytes(40)),
        npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (10,), }"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (10,), }"),
        npy("(" * 100),
        b"",
    ],
)
def test_arrays_of_another_type_or_size_are_rejected(content):
    with pytest.raises(ValueError, match="unexpected array header"):
        decoded_array(content, np.int32, 10)
