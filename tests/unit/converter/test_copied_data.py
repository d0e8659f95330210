"""Test that a copy contains the original's keys, tensors and data byte for byte."""

import hashlib
from pathlib import Path

import pytest

from pop_converter.gguf.header import read_header
from pop_converter.popfile.format import PREFIX
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from support.shapes import read_shape
from support.synthetic import DEFAULTS, add_keys, make_gguf, make_split


def parts_of(path: Path) -> tuple[list[bytes], bytes, bytes]:
    """Return a file's keys except POP keys, its tensor table, and its data, as bytes."""
    header, raw = read_header(path), path.read_bytes()
    keys = [raw[k.start : k.end] for name, k in header.keys.items() if not name.startswith(PREFIX)]
    return keys, raw[header.keys_end : header.tensors_end], raw[header.data_start :]


@pytest.mark.parametrize("arch", sorted(DEFAULTS))
def test_copies_tensors_of_every_architecture(tmp_path, arch):
    src, copy = make_gguf(tmp_path / "model.gguf", arch), tmp_path / "pop.gguf"
    convert(make_plan(read_shape(src)), src, copy)
    assert parts_of(copy) == parts_of(src)


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("n_odd", range(5))
def test_copies_data_after_odd_headers(tmp_path, alignment, n_odd):
    """Vary the header's length modulo the alignment, and append bytes after the last tensor."""
    src = make_gguf(tmp_path / "model.gguf", "llama", alignment=alignment)
    odd, copy = tmp_path / "odd.gguf", tmp_path / "pop.gguf"
    add_keys(src, odd, some__key="x" * n_odd)
    with odd.open("ab") as file:
        file.write(b"?" * n_odd)
    convert(make_plan(read_shape(odd)), odd, copy)
    assert parts_of(copy) == parts_of(odd)


def test_parts_of_a_split_model_are_joined(tmp_path):
    parts = make_split(tmp_path / "model.gguf", "gemma2", max_tensors=50)
    copy, whole = tmp_path / "pop.gguf", make_gguf(tmp_path / "whole.gguf", "gemma2")
    meta = convert(make_plan(read_shape(parts[0])), parts[0], copy)
    assert meta.source_sha256 == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert parts_of(copy) == parts_of(whole)
