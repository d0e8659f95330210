"""Test the estimated duration of a conversion, and the note that shows it."""

import pytest

from pop_base.errors import PopError
from pop_base.numbers import duration as in_words
from pop_converter.gguf.source import read_source
from pop_local.commands.opening import note_conversion
from pop_local.workflows.conversion import duration
from pop_local.workflows.conversion.duration import sidecar_seconds
from support.synthetic import make_gguf


def seconds_of(path, **overrides):
    return sidecar_seconds(read_source(make_gguf(path, "llama", **overrides)))


def test_estimate_is_proportional_to_work(tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 1e9)
    few, more, most = (seconds_of(tmp_path / f"{n}.gguf", n_layer=n) for n in (4, 8, 12))
    assert 0 < few < more and most - more == pytest.approx(more - few)
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 2e9)
    assert seconds_of(tmp_path / "4.gguf", n_layer=4) == pytest.approx(few / 2)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_the_output_head(tmp_path, monkeypatch, tied):
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 1e9)
    few, more, most = (
        seconds_of(tmp_path / f"{n}.gguf", n_vocab=n, tied_output=tied) for n in (384, 768, 1152)
    )
    assert few < more and most - more == pytest.approx(more - few)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "1 minute"),
        (89, "1 minute"),
        (490, "8 minutes"),
        (5000, "83 minutes"),
        (7000, "2 hours"),
    ],
)
def test_duration_has_minutes_or_hours(seconds, words):
    assert in_words(seconds) == words


def test_counts_only_the_experts_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(duration, "_macs_per_s", lambda: 1e9)
    two, four, eight = (
        sidecar_seconds(read_source(make_gguf(path, "qwen3moe", n_expert_used=n_used)))
        for n_used in (2, 4, 8)
        for path in [tmp_path / f"{n_used}.gguf"]
    )
    assert 0 < two < four and eight - four == pytest.approx(2 * (four - two))


def test_note_contains_the_command_once(tmp_path, capsys):
    path = make_gguf(tmp_path / "model.gguf", "llama")
    note_conversion(path)
    note_conversion(path)
    printed = capsys.readouterr()
    assert printed.out == ""
    text = " ".join(printed.err.split())
    assert text.count("convert") == 1 and "model.gguf --sidecar" in text
    assert "about 1 minute on this machine" in text


def test_unconvertible_model_gets_no_note(monkeypatch, tmp_path, capsys):
    def fail(source):
        raise PopError("no layers")

    monkeypatch.setattr("pop_local.commands.opening.sidecar_seconds", fail)
    note_conversion(make_gguf(tmp_path / "model.gguf", "llama"))
    assert capsys.readouterr().err == ""
