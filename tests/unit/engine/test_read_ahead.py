"""Test that models are written and read in large pieces, which Linux caches in large pages."""

import random
import re
import sys
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest

from pop_base.files import mapped
from pop_base.output_file import WRITE_BYTES, replacing
from pop_converter.gguf.source import read_source
from pop_local.engine.llama import loading
from support.calls import opened

Memory = namedtuple("Memory", "available")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")


@pytest.fixture
def read_ahead(monkeypatch):
    """Return a list that collects the (path, start, size) of each piece read ahead."""
    pieces = []

    @contextmanager
    def counted(path):
        class View:
            def __len__(self):
                return path.stat().st_size

            def madvise(self, advice, start, size):
                pieces.append((path, start, size))

        yield View()

    monkeypatch.setattr(loading, "mapped", counted)
    return pieces


@on_linux
def test_mapped_model_is_read_ahead_in_pieces(pop_file, read_ahead, monkeypatch):
    monkeypatch.setattr(loading, "_PIECE_BYTES", 1 << 16)
    opened(pop_file).close()
    sizes = [size for _, _, size in read_ahead]
    assert sum(sizes) == pop_file.stat().st_size
    assert set(sizes[:-1]) == {1 << 16}
    assert [start for _, start, _ in read_ahead] == list(range(0, sum(sizes), 1 << 16))


def test_copied_model_is_not_read_ahead(pop_file, read_ahead):
    opened(pop_file, use_mmap=False).close()
    assert read_ahead == []


def test_model_larger_than_the_free_memory_is_not_read_ahead(read_ahead, pop_file, monkeypatch):
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: Memory(1000))
    loading.read_ahead(read_source(pop_file))
    assert read_ahead == []


@on_linux
def test_linux_accepts_the_advice(pop_file):
    with mapped(pop_file) as view:
        view.madvise(loading._POPULATE_READ, 0, len(view))
        maps = Path("/proc/self/smaps").read_text()
    [flags, *_] = re.findall("VmFlags: (.*)", maps[maps.index(str(pop_file)) :])
    assert " hg" in flags  # MADV_HUGEPAGE


@pytest.mark.parametrize("n_before", [0, 1, 70_001, WRITE_BYTES - 1, 3 * WRITE_BYTES + 5])
def test_pieces_end_at_multiples_of_their_size(tmp_path, n_before):
    path = tmp_path / "model.gguf"
    data = random.Random(n_before).randbytes(7 * WRITE_BYTES + 1000)
    ends = []
    with replacing(path, force=False) as file:
        [temporary] = tmp_path.iterdir()
        file.write(data[:n_before])
        for start in range(n_before, len(data), 1 << 16):
            file.write(data[start : start + (1 << 16)])
            ends.append(temporary.stat().st_size)
    assert {end % WRITE_BYTES for end in ends} == {0}
    assert max(ends) == 7 * WRITE_BYTES
    assert path.read_bytes() == data
