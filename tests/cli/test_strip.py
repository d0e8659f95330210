"""Test `strip`: it restores the original byte for byte, or writes no file."""

import hashlib
from pathlib import Path

import pytest

from pop_converter.base.errors import FormatError, OutputExistsError, WriteError
from pop_converter.gguf.header import read_header
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert, strip
from support.shapes import read_shape
from support.synthetic import DEFAULTS, add_keys, make_gguf, make_split


def converted(src: Path, dst: Path) -> Path:
    convert(make_plan(read_shape(src)), src, dst)
    return dst


@pytest.fixture
def pop(tiny) -> Path:
    return converted(tiny, tiny.with_name("tiny.pop.gguf"))


@pytest.mark.parametrize("arch", sorted(DEFAULTS))
def test_round_trip(tmp_path, arch):
    src = make_gguf(tmp_path / "model.gguf", arch)
    back = tmp_path / "back.gguf"
    strip(converted(src, tmp_path / "pop.gguf"), back)
    assert back.read_bytes() == src.read_bytes()


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("n_odd", range(5))
def test_round_trip_of_odd_headers_and_ends(tmp_path, alignment, n_odd):
    """Vary the header's length modulo the alignment, and append bytes after the last tensor."""
    src = make_gguf(tmp_path / "model.gguf", "llama", alignment=alignment)
    odd = add_keys(src, tmp_path / "odd.gguf", some__key="x" * n_odd)
    with odd.open("ab") as file:
        file.write(b"?" * n_odd)
    strip(converted(odd, tmp_path / "pop.gguf"), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == odd.read_bytes()


def test_split_model_comes_back_as_one_file(tmp_path):
    parts = make_split(tmp_path / "model.gguf", "gemma2", max_tensors=50)
    back = tmp_path / "back.gguf"
    meta = strip(converted(parts[0], tmp_path / "pop.gguf"), back)
    assert meta.source_sha256 == hashlib.sha256(back.read_bytes()).hexdigest()
    whole = make_gguf(tmp_path / "whole.gguf", "gemma2")
    assert back.read_bytes() == whole.read_bytes()


def test_changed_file_is_refused(tmp_path, pop):
    header = read_header(pop)
    data = bytearray(pop.read_bytes())
    data[header.data_start + 12345] ^= 1
    pop.write_bytes(data)
    back = tmp_path / "back.gguf"
    back.write_text("mine")
    with pytest.raises(FormatError, match="changed after its conversion"):
        strip(pop, back, force=True)
    assert back.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.gguf",
        "tiny.gguf",
        "tiny.pop.gguf",
    ]


def test_file_without_pop_keys_is_refused(tiny, tmp_path):
    with pytest.raises(FormatError, match="is not a converted file"):
        strip(tiny, tmp_path / "back.gguf")


def test_outputs_that_must_not_be_replaced(tiny, pop):
    with pytest.raises(OutputExistsError):
        strip(pop, tiny)
    with pytest.raises(WriteError, match="input file"):
        strip(pop, pop, force=True)
