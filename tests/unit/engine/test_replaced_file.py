"""Replacing a mapped model file while it is open is detected."""

import os
import shutil

import pytest

from pop_base.errors import PopError
from support.calls import greedy, opened, prompt
from support.converted import paired
from support.synthetic import make_gguf


@pytest.fixture
def pair(tmp_path):
    return paired(make_gguf(tmp_path / "llama.gguf", "llama", n_layer=4), tmp_path, "own", 2)


def over(path, other):
    shutil.copyfile(other, path)


def renamed(path, other):
    shutil.copyfile(other, path.with_suffix(".new")).replace(path)


def cut(path, other):
    os.truncate(path, path.stat().st_size - 32)


@pytest.mark.parametrize("change", [over, renamed, cut])
@pytest.mark.parametrize("which", ["model", "sidecar"])
def test_file_that_was_replaced_is_refused(pair, tmp_path, change, which):
    base = tmp_path / "llama.gguf"
    path = base if which == "model" else pair.sidecar
    with opened(base, sidecar=pair.sidecar) as model:
        greedy(model, prompt(40))
        change(path, make_gguf(tmp_path / "other.gguf", "llama", n_layer=4, seed=1))
        for tokens in (prompt(40), prompt(40, seed=1)):
            with pytest.raises(PopError, match=f"{path.name} was changed after it was opened"):
                greedy(model, tokens)


def test_deleted_or_unmapped_file_keeps_working(tmp_path):
    path = make_gguf(tmp_path / "llama.gguf", "llama", n_layer=4)
    with opened(path, use_mmap=False) as copied, opened(path) as mapped:
        expected = greedy(mapped, prompt(40))
        path.unlink()
        assert greedy(mapped, prompt(50)[:40]) == expected
        path.write_bytes(b"no model")
        assert greedy(copied, prompt(40)) == expected
