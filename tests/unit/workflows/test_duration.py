"""Test the estimated duration of a conversion, and the note that shows it."""

import pytest

from pop_converter.base.errors import PopError
from pop_converter.gguf.source import read_source
from pop_local.commands.opening import note_conversion
from pop_local.workflows.conversion import duration
from pop_local.workflows.conversion.duration import sidecar_seconds
from support.synthetic import make_gguf


def test_estimate_is_proportional_to_work(tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 1e9)
    sources = [read_source(make_gguf(tmp_path / f"{n}.gguf", "llama", n_layer=n)) for n in (4, 8)]
    few, many = map(sidecar_seconds, sources)
    assert many == pytest.approx(2 * few)
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 2e9)
    assert sidecar_seconds(sources[0]) == pytest.approx(few / 2)


def test_counts_only_the_experts_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 1e9)
    two, four, eight = (
        sidecar_seconds(read_source(make_gguf(path, "qwen3moe", n_expert_used=n_used)))
        for n_used in (2, 4, 8)
        for path in [tmp_path / f"{n_used}.gguf"]
    )
    assert 0 < two < four and eight - four == pytest.approx(2 * (four - two))


def test_note_names_the_command_once(tmp_path, capsys):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    note_conversion(path)
    note_conversion(path)
    printed = capsys.readouterr()
    assert printed.out == ""
    text = " ".join(printed.err.split())
    assert text.count("convert") == 1 and "model.gguf --sidecar" in text
    assert "about 60 s on this machine" in text


def test_no_note_if_the_model_cannot_be_converted(monkeypatch, tmp_path, capsys):
    def fail(source):
        raise PopError("no layers")

    monkeypatch.setattr("pop_local.commands.opening.sidecar_seconds", fail)
    note_conversion(make_gguf(tmp_path / "model.gguf", "llama"))
    assert capsys.readouterr().err == ""
