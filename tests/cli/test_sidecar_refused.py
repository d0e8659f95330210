"""Test that a foreign, edited or truncated sidecar causes a clear error and no crash."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from typer.testing import CliRunner

from pop_base.errors import FormatError, PopError
from pop_converter.gguf.source import read_source
from pop_converter.popfile.sidecar import read_sidecar
from pop_local.cli import app
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from support.calls import first_of
from support.converted import Pair, paired
from support.raw import Job, run
from support.synthetic import make_gguf


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("fitted")
    return paired(make_gguf(folder / "tiny.gguf", "llama"), folder, "fitted", boundary=4)


# Key: type and value. Tensor: data and type.
Items = dict[str, tuple[Any, Any]]
Edit = Callable[[Items, Items], object]


def edited(sidecar: Path, dst: Path, edit: Edit) -> Path:
    """Write a copy of a sidecar, edited by `edit(keys, tensors)`."""
    reader = gguf.GGUFReader(sidecar)
    keys: Items = {
        name: (field.types[0], field.contents())
        for name, field in reader.fields.items()
        if name.startswith("pop.")
    }
    tensors: Items = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    edit(keys, tensors)
    writer = gguf.GGUFWriter(dst, "pop-sidecar")
    for name, (kind, value) in keys.items():
        writer.add_key_value(name, value, kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dst


def _nan(keys: Items, tensors: Items) -> None:
    tensors["blk.6.pop_attn_k.bias"][0][3] = np.nan


def _shape(keys: Items, tensors: Items) -> None:
    data, kind = tensors["blk.6.pop_attn_v.weight"]
    tensors["blk.6.pop_attn_v.weight"] = data[:-1], kind


def _unknown(keys: Items, tensors: Items) -> None:
    tensors["blk.6.attn_k.weight"] = tensors.pop("blk.6.pop_attn_k.weight")


def _keys(**changes: tuple[GGUFValueType, object]) -> Edit:
    changed = {f"pop.{name.replace('__', '.')}": entry for name, entry in changes.items()}
    return lambda keys, tensors: keys.update(changed)


EDITS = {
    "nan": (_nan, r"tensor 'blk\.6\.pop_attn_k\.bias' has values that are not finite"),
    "shape": (_shape, r"blk\.6\.pop_attn_v\.weight.* wrong shape"),
    "missing": (
        lambda keys, tensors: tensors.pop("blk.6.pop_attn_k.weight"),
        r"has no tensor blk\.6\.pop_attn_k\.weight",
    ),
    "unknown": (_unknown, r"has no tensor blk\.6\.pop_attn_k\.weight"),
    "schedule": (
        _keys(schedule=(GGUFValueType.STRING, "FFFFSSSSS")),
        "has no tensor|9 layers|one letter for each",
    ),
    "unbound": (
        lambda keys, tensors: keys.pop("pop.sidecar.base_bytes"),
        "base_bytes is missing",
    ),
    "size": (
        _keys(sidecar__base_bytes=(GGUFValueType.UINT64, 12345)),
        r"was created for .*, not for",
    ),
    "version": (_keys(version=(GGUFValueType.UINT32, 2)), "POP version 2"),
}
# The message is the library's, since the engine's checks do not run.
BARE = {
    "nan": "not finite",
    "shape": "wrong shape",
    "missing": r"blk\.6\.pop_attn_k\.weight",
    "unknown": r"tensor blk\.6\.attn_k\.weight, which does not belong in a sidecar",
    "schedule": "one letter for each of the 8 layers",
    "unbound": "belongs to another model",
    "size": "belongs to another model: one of 12345 bytes",
    "version": "pop.version is 2",
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_sidecar_is_refused(name, fitted, tmp_path):
    edit, reason = EDITS[name]
    sidecar = edited(fitted.sidecar, tmp_path / "edited.gguf", edit)
    with pytest.raises(PopError, match=reason):
        PopModel(EngineOptions.of(fitted.base, sidecar=sidecar, n_ctx=256, n_threads=1))
    with pytest.raises(RuntimeError, match=BARE[name]):
        run(Job(str(fitted.base), steps=(), further=(str(sidecar),)))


def test_unedited_sidecar_is_accepted(fitted, tmp_path):
    sidecar = edited(fitted.sidecar, tmp_path / "same.gguf", lambda keys, tensors: None)
    model = PopModel(EngineOptions.of(fitted.base, sidecar=sidecar, n_ctx=256, n_threads=1))
    assert first_of(model).settings.boundary == 4


@pytest.mark.parametrize("n_bytes", [0, 3, 7, 100, 900, -4096, -1])
def test_truncated_sidecar_is_refused(n_bytes, fitted, tmp_path):
    sidecar = tmp_path / "cut.gguf"
    sidecar.write_bytes(fitted.sidecar.read_bytes()[:n_bytes])
    with pytest.raises(FormatError):
        read_sidecar(sidecar, read_source(fitted.base))
    with pytest.raises(RuntimeError, match=r"sidecar|not within the file bounds"):
        run(Job(str(fitted.base), steps=(), further=(str(sidecar),)))


def test_sidecar_of_another_model_is_refused(fitted, tmp_path):
    """Change keys but not the size, so that only the hash differs."""
    other = tmp_path / "other.gguf"
    other.write_bytes(
        fitted.base.read_bytes().replace(b"tiny random model", b"tiny other modelx", 1)
    )
    with pytest.raises(FormatError, match=r"was created for .*, not for .*other\.gguf"):
        PopModel(EngineOptions.of(other, sidecar=fitted.sidecar))


def test_converted_base_is_refused(fitted):
    with pytest.raises(FormatError, match="is a converted model"):
        PopModel(EngineOptions.of(fitted.single, sidecar=fitted.sidecar))
    with pytest.raises(RuntimeError, match="already has POP keys"):
        run(Job(str(fitted.single), steps=(), further=(str(fitted.sidecar),)))


def test_models_are_refused_as_sidecars(fitted):
    with pytest.raises(FormatError, match="not a sidecar"):
        PopModel(EngineOptions.of(fitted.base, sidecar=fitted.single))
    with pytest.raises(FormatError, match="not a sidecar"):
        PopModel(EngineOptions.of(fitted.base, sidecar=fitted.base))
    for further in (fitted.single, fitted.base):
        with pytest.raises(RuntimeError, match="not a sidecar"):
            run(Job(str(fitted.base), steps=(), further=(str(further),)))


def test_sidecar_is_refused_as_model(fitted):
    with pytest.raises(FormatError, match="is a sidecar, not a model"):
        PopModel(EngineOptions.of(fitted.sidecar))
    with pytest.raises(RuntimeError, match="unknown model architecture: 'pop-sidecar'"):
        run(Job(str(fitted.sidecar), steps=()))


def test_second_sidecar_is_refused(fitted, tmp_path):
    again = shutil.copy(fitted.sidecar, tmp_path / "again.gguf")
    with pytest.raises(RuntimeError, match="there are 3 files for a model of 1 and one sidecar"):
        run(Job(str(fitted.base), steps=(), further=(str(fitted.sidecar), str(again))))


REFUSED = {
    "convert": (("convert", "tiny.pop-sidecar.gguf"), "is a sidecar"),
    "run": (("run", "tiny.pop-sidecar.gguf", "hi"), "is a sidecar"),
    "model as sidecar": (("run", "tiny.gguf", "hi", "--sidecar", "tiny.gguf"), "is not a sidecar"),
    "no such sidecar": (("run", "tiny.gguf", "hi", "--sidecar", "no.gguf"), "does not exist"),
    "other model": (
        ("run", "other.gguf", "hi", "--sidecar", "tiny.pop-sidecar.gguf"),
        "not for ",
    ),
    "other model, inspected": (
        ("inspect", "other.gguf", "--sidecar", "tiny.pop-sidecar.gguf"),
        "not for ",
    ),
    "converted model": (
        ("chat", "single.gguf", "--sidecar", "tiny.pop-sidecar.gguf"),
        "is a converted model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_commands_report_refusal_in_two_lines(name, tmp_path, monkeypatch):
    paired(make_gguf(tmp_path / "tiny.gguf", "llama"), tmp_path, "fitted", boundary=4)
    make_gguf(tmp_path / "other.gguf", "llama", seed=1, n_layer=9)
    before = sorted(tmp_path.iterdir())
    arguments, reason = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    error, hint = done.stderr.splitlines()
    assert reason in error and hint.startswith("hint: ")
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
