"""Test `convert` at a named boundary: measurements, warnings, refusals."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner, Result

from pop_converter.fit import weights
from pop_local.cli import app
from pop_local.measure import budget
from pop_local.workflows.conversion import convert_model as examining
from support.shapes import read_pop_meta
from support.synthetic import make_gguf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_examination")]

ANYTHING = replace(budget.BALANCED, max_kl=50.0, max_ppl_ratio=1000.0, max_copy_ratio=1000.0)


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", "--threads", "1", *map(str, arguments)])


def allow(monkeypatch: pytest.MonkeyPatch, balanced: budget.Budget, fast: budget.Budget) -> None:
    # The names stay, because the command line's choices are the budgets' names.
    fast = replace(fast, quality=budget.FAST.quality)
    monkeypatch.setattr(examining, "BALANCED", balanced)
    monkeypatch.setattr(budget, "FAST", fast)


def shown(model: Path) -> str:
    return CliRunner().invoke(app, ["inspect", str(model)]).stdout


def test_measures_own_projections_if_budget_is_set(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as unmeasured:
        unmeasured.setattr(examining, "measure_pruning", None)
        done = convert(tiny, "--projection", "own", "--boundary", 5)
    assert done.exit_code == 0, done.stderr
    assert "The loss was not measured, because" in " ".join(done.stderr.split())
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.measured is None
    assert "BROKEN" not in shown(tmp_path / "tiny.pop.gguf")
    limits = ("--max-kl", 50, "--max-ppl-ratio", 1000, "--max-copy-ratio", 1000)
    done = convert(tiny, "--projection", "own", "--boundary", 5, *limits, "--force")
    meta = read_pop_meta(tmp_path / "tiny.pop.gguf")
    assert meta is not None and meta.measured is not None


def test_writes_fit_outside_budget_with_warning(tiny, words, tmp_path, monkeypatch):
    allow(monkeypatch, replace(ANYTHING, max_kl=1e-6), ANYTHING)
    done = convert(tiny, "--boundary", 5, "--text", words, "--tokens", 2048)
    assert done.exit_code == 0, done.stderr
    assert ") exceeds the balanced budget (KL 1e-06," in done.stderr
    assert (tmp_path / "tiny.pop.gguf").exists()


def test_warns_if_trained_context_is_shorter_than_window(tmp_path):
    path = make_gguf(tmp_path / "short.gguf", "llama", n_ctx_train=256)
    done = convert(path, "--projection", "own", "--boundary", 5)
    assert done.exit_code == 0, done.stderr
    warned = " ".join(done.stderr.split())
    assert "trained on contexts of 256 tokens, but the measurement uses windows of 512" in warned


def test_dry_run_rejects_unreadable_weights(tiny, monkeypatch):
    with monkeypatch.context() as unknown:
        unknown.setattr(weights, "dequantize", Mock(side_effect=NotImplementedError))
        refused = convert(tiny, "--dry-run")
        assert refused.exit_code == 1
        assert "has a type that cannot be dequantized" in " ".join(refused.stderr.split())
        assert convert(tiny, "--dry-run", "--projection", "own").exit_code == 0
    with tiny.open("ab") as file:
        file.write(bytes(4096))
    refused = convert(tiny, "--dry-run")
    assert refused.exit_code == 1
    assert "contains data after its last tensor" in " ".join(refused.stderr.split())
