"""Test `pop-local convert` at a named boundary: fits, measurements, refusals, stops."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

import pop_local
from pop_base.errors import PopError
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.cli import app
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.measure import budget
from pop_local.workflows.conversion import convert_model as examining
from pop_local.workflows.conversion.conversion_plan import Boundary, ConvertOptions
from support.converted import names
from support.shapes import read_pop_meta
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow

THIRD = ("--boundary", "5")
FEW = ("--tokens", "2048", "--threads", "1")


def convert(*arguments: object):
    """Run `convert`, skipping a third of the layers unless the arguments name a boundary."""
    depth = () if "--boundary" in arguments else THIRD
    return CliRunner().invoke(app, ["convert", *map(str, arguments), *depth, *FEW])


def test_default_is_measured_fit(tiny, tmp_path, short_examination):
    done = convert(tiny, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.calibration is not None and meta.measured is not None
    assert (meta.projection, meta.calibration.n_tokens) == ("fitted", 2048)
    assert report["calibration"] == asdict(meta.calibration)
    assert report["measured"] == asdict(meta.measured)
    assert 0 < meta.measured.kl_mean < 0.1
    assert names(tmp_path) == {"tiny.gguf", "tiny.pop.gguf"}


def test_prints_stored_figures(tiny, tmp_path, words, monkeypatch):
    monkeypatch.setattr(examining, "N_WINDOWS", 2)
    done = convert(tiny, "--text", words)
    shown = " ".join(done.stdout.split())
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.measured is not None
    assert f"KL {meta.measured.kl_mean:.4f} ± {meta.measured.kl_se:.4f}" in shown
    right = f"the top prediction is correct for {meta.measured.copy_top1:.1%} of tokens"
    assert f"perplexity ratio {meta.measured.copy_ppl_ratio:.3f}; {right}" in shown
    assert shown.count("only pop-local can open") == 1


def test_speedup_limits_include_cost_of_wide_fit(tiny, tmp_path, words, short_examination):
    done = convert(
        tiny, "--projection", "fitted-wide", "--deep-rows", "none", "--text", words, "--json"
    )
    assert done.exit_code == 0, done.output
    report, target = json.loads(done.stdout), tmp_path / "tiny.pop.gguf"
    meta = read_pop_meta(target)
    assert meta is not None and meta.projection == report["projection"] == "fitted-wide"
    limit = speedup_limit(GraphMacs(target), LIMIT_PROMPT, meta.boundary, 1 + 32)
    assert limit < speedup_limit(GraphMacs(tiny), LIMIT_PROMPT, meta.boundary, 1 + 32)
    assert report["speedup_limit"] == pytest.approx(limit, rel=1e-3)
    short = ("--windows", "2", "--context", "60", "--continuation", "20", "--lookups", "0")
    few = (str(target), "--threads", "1", "--json")
    found = json.loads(CliRunner().invoke(app, ["eval", *few, *short]).stdout)
    assert (found["projection"], found["speedup_limit"]) == ("fitted-wide", limit)
    done = CliRunner().invoke(app, ["inspect", str(target)])
    assert "fitted-wide" in done.stdout


def test_cheap_wide_fit_is_the_default(tmp_path, words, short_examination):
    """Use a model with few K/V heads and a wide FFN."""
    model = make_gguf(tmp_path / "cheap.gguf", "llama", n_head_kv=1, n_ff=1024)
    done = convert(model, "--boundary", 6, "--text", words)
    assert done.exit_code == 0, done.output
    meta = read_pop_meta(tmp_path / "cheap.pop.gguf")
    assert meta is not None and meta.projection == "fitted-wide"


def test_fits_on_several_files(tiny, tmp_path, words, short_examination):
    notes = tmp_path.parent / f"{tmp_path.name}-notes.md"
    notes.write_text(" ".join(f"note{number}" for number in range(3000)))
    done = convert(tiny, "--text", words, "--text", notes, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["calibration"]["name"] == f"words.txt, {notes.name}"


def test_one_skipped_layer_needs_no_fit(tiny, tmp_path):
    assert convert(tiny, "--boundary", 7).exit_code == 0
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None
    assert (meta.projection, meta.calibration) == ("own", None)


def test_force_writes_fit_that_cannot_copy(tiny, tmp_path, words, monkeypatch, short_examination):
    monkeypatch.setattr(budget, "FAST", replace(budget.FAST, max_copy_ratio=0.0))
    refused = convert(tiny, "--text", words)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert names(tmp_path) == {"tiny.gguf"}
    kept = convert(tiny, "--text", words, "--force")
    assert kept.exit_code == 0
    assert "can no longer copy" in kept.stderr
    assert names(tmp_path) == {"tiny.gguf", "tiny.pop.gguf"}


# --- bad input


def assert_refused(done, folder: Path, reason: str) -> None:
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "hint"))]
    assert len(lines) == 2 and reason in lines[0]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert len(names(folder)) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no text"),
        (b"a\0b", "binary"),
        (b"too short " * 20, "needs at least 2,048"),
        (b"again " * 5000, "distinct tokens"),
    ],
)
def test_rejects_unusable_texts(tiny, tmp_path, tmp_path_factory, content, reason):
    path = tmp_path_factory.mktemp("bad") / "text.txt"
    path.write_bytes(content)
    assert_refused(convert(tiny, "--text", path), tmp_path, reason)


def test_rejects_singular_gram_matrix(tmp_path, words):
    """Fit N inputs to fewer than N tokens, since a window's first token does not count."""
    wide = make_gguf(tmp_path / "wide.gguf", "llama", n_embd=2048, n_layer=3, n_ff=64)
    fit = FitOptions(2048, (words,), ridge=0.0, projection=Projection.FITTED)
    with pytest.raises(PopError, match="singular"):
        pop_local.convert(wide, options=ConvertOptions(Boundary(1), fit), force=True)


@pytest.mark.parametrize("own_text", [True, False])
def test_rejects_non_finite_activations(tiny, tmp_path, words, own_text):
    with tiny.open("r+b") as file:
        norm = next(t for t in gguf.GGUFReader(tiny).tensors if t.name == "blk.1.attn_norm.weight")
        file.seek(norm.data_offset)
        file.write(np.full(3, np.nan, np.float32).tobytes())
    done = convert(tiny, *([] if own_text else ["--text", words]))
    assert_refused(done, tmp_path, "NaN logits" if own_text else "contains NaN or infinity")


def test_rejects_fit_options_with_own_projections(tiny):
    assert convert(tiny, "--projection", "own").exit_code == 2  # because of --tokens
