"""Test `pop-local inspect` on converted, unconverted and damaged files."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import convert
from pop_local.cli import app
from support.shapes import read_shape
from support.synthetic import make_gguf, renamed


def inspect(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def converted(tiny: Path) -> Path:
    target = tiny.with_name("tiny.pop.gguf")
    convert(make_plan(read_shape(tiny), boundary=5, tail_tokens=7), tiny, target)
    return target


def test_describes_unconverted_file(tiny):
    report = json.loads(inspect(tiny, "--json").stdout)
    assert report["architecture"] == "llama"
    assert report["skipping"]["fits_from"] == 1
    assert report["n_layer"] == 8
    assert report["boundary"] is None
    assert report["pop"] is None
    assert report["opens_in_stock_llama_cpp"]
    assert report["size_bytes"] == tiny.stat().st_size


def test_describes_converted_file(tiny, converted):
    report = json.loads(inspect(converted, "--json").stdout)
    assert (report["boundary"], report["n_skipped"]) == (5, 3)
    assert report["pop"]["schedule"] == "FFFFFSSS"
    assert report["pop"]["projection"] == "own"
    assert report["pop"]["tail_tokens"] == 7
    assert report["pop"]["source_name"] == tiny.name
    assert report["opens_in_stock_llama_cpp"]
    sha256 = hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert report["pop"]["source_sha256"] == sha256


def test_prints_summary_of_converted_file(converted):
    shown = inspect(converted).stdout
    assert "Prompt tokens skip layer 5 and all later layers (3 of 8 layers)." in shown
    assert "the first token and the last 7 tokens" in shown
    assert "tiny.gguf" in shown
    assert "opens this file, but without fast reading" in shown
    lines = shown.splitlines()
    assert lines.index("") == 5, "a summary comes first"
    assert " ".join(lines[3].split()) == "Fast reading skips 3 of 8 layers"


@pytest.mark.slow
def test_summary_shows_model_kind_and_limits(smollm2, gemma):
    shown = {model: " ".join(inspect(model).stdout.split()) for model in (smollm2, gemma)}
    assert "Kind chat model, trained on contexts of up to 8,192 tokens" in shown[smollm2]
    assert (
        "skips 7 of 30 layers and meets the 'near-lossless' quality limits Stock" in shown[smollm2]
    )
    assert (
        "Kind base model (it has no chat template), trained on contexts of up to 32,768"
        in shown[gemma]
    )
    assert "'fast' quality limits, which allow more loss than the default limits" in shown[gemma]


def test_shows_unsupported_architecture(tmp_path):
    path = renamed(make_gguf(tmp_path / "other.gguf", "llama"), tmp_path, "dream")
    done = inspect(path)
    assert done.exit_code == 0
    told = " ".join(done.stdout.split())
    assert "Architecture dream" in told
    assert re.search("Fast reading not available: .*a diffusion model", told)


@pytest.mark.parametrize(("arch", "projections"), [("llama", "fitted or own"), ("olmo2", "own")])
def test_shows_layers_that_can_be_skipped(tmp_path, arch, projections):
    done = inspect(make_gguf(tmp_path / "model.gguf", arch))
    told = " ".join(done.stdout.split())
    assert "Can be skipped layers 1 to 7" in told
    assert f"Projections {projections}" in told


def test_reports_bad_file_in_one_error(tmp_path, tiny):
    text = tmp_path / "notes.gguf"
    text.write_text("not a model")
    short = tmp_path / "short.gguf"
    shutil.copy(tiny, short)
    with short.open("r+b") as file:
        file.truncate(tiny.stat().st_size // 2)
    for path, reason in (
        (text, "is not a GGUF file"),
        (short, "is truncated"),
        (tmp_path / "absent.gguf", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        done = inspect(path)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) <= 2
