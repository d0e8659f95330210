"""`pop-local analyze` with a fit: what is fitted, what is chosen, what it takes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from analyzed import FITTED, UNFITTED, analyze, report
from pop_converter.shape import read_shape
from pop_converter.source import read_source
from synthetic import make_gguf

from pop_local.calibration.needs import plan_needs
from pop_local.commands import analyzing
from pop_local.commands.fitting import FitOptions
from pop_local.measure import budget
from pop_local.measure.depth import Depth, deepest_within, with_fits, worth_fitting
from pop_local.measure.estimate import Estimate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("analyze") / "tiny.gguf", "llama", n_layer=6)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(analyzing, "N_DRAWS", 2)


def test_each_boundary_is_fitted_and_one_is_chosen(model, text):
    done = analyze(model, "--text", text, *FITTED, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    *shallow, deepest = found["boundaries"]
    assert deepest["fitted"]["kl_mean"] < deepest["kl_mean"]
    assert deepest["fitted"]["n_pruned"] == deepest["n_pruned"]
    # What loses nothing without a fit is not fitted.
    assert shallow[0]["fitted"] is None
    assert found["calibration"]["n_tokens"] == 2048
    # Random weights lose little: the deepest is within.
    assert found["chosen"]["boundary"] == deepest["boundary"] == 3
    assert found["chosen"]["projection"] == "fitted"
    assert found["chosen"]["budget"]["quality"] == "balanced"


def test_the_choice_is_named_an_estimate(model, text):
    done = analyze(model, "--text", text, *FITTED)
    assert done.exit_code == 0, done.output
    [row] = [
        line for line in done.stdout.splitlines() if line.startswith("|") and "balanced" in line
    ]
    assert row.split("|")[1].strip() == "3"
    assert "2,048 tokens" in done.stdout
    assert "balanced would take boundary 3" in done.stdout
    assert "an estimate from 2 windows" in done.stdout


def test_without_a_fit_the_own_projections_decide(model, text, monkeypatch):
    found = report(model, "--text", text, "--no-gates")
    assert found["calibration"] is None
    assert [row["fitted"] for row in found["boundaries"]] == [None] * 3
    assert found["chosen"]["projection"] == "own"
    by_own = [row["boundary"] for row in found["boundaries"] if is_within(row)]
    assert found["chosen"]["boundary"] == min(by_own)
    nothing = replace(budget.BALANCED, max_kl=-1.0)
    monkeypatch.setattr(budget, "BALANCED", nothing)
    assert report(model, "--text", text, "--no-gates")["chosen"]["boundary"] is None
    done = analyze(model, "--text", text, "--no-gates", *UNFITTED)
    assert "no boundary is within the balanced budget" in done.stdout


def test_tokens_without_a_fit_are_wrong_usage(model):
    assert analyze(model, *UNFITTED, "--tokens", 4096).exit_code == 2


def test_too_little_memory_for_the_fit(model, text, monkeypatch):
    monkeypatch.setattr(analyzing, "free_bytes", lambda: 100_000_000)
    done = analyze(model, "--text", text, *FITTED)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "the fit needs" in message
    assert "MB of memory, 100.0 MB are free" in message
    assert "--no-fit" in message
    assert done.stdout == ""


def test_as_many_boundaries_as_there_is_memory_for(model, monkeypatch):
    run = SimpleNamespace(
        source=read_source(model), shape=read_shape(model), fit_tokens=2048, gpu_layers=0
    )
    plans = [analyzing._plan(run, boundary) for boundary in (3, 4)]  # type: ignore[arg-type]
    sums = [plan_needs(plans[:n], run.source, 1 << 40).sums_bytes for n in (1, 2)]
    monkeypatch.setattr(FitOptions, "memory_bytes", property(lambda options: sums[0]))
    assert analyzing._affordable(plans, run) == plans[:1]  # type: ignore[arg-type]
    monkeypatch.setattr(FitOptions, "memory_bytes", property(lambda options: sums[1]))
    assert analyzing._affordable(plans, run) == plans  # type: ignore[arg-type]


def test_a_fit_is_tried_down_to_one_boundary_past_hope():
    figures = ((0.02, 1), (0.02, 0.99), (0.1, 0.95), (0.2, 0.9), (0.2, 0.3), (0.3, 0.1))
    depths = [made(9 - n, kl, retention) for n, (kl, retention) in enumerate(figures)]
    # 6 is the deepest that balanced may take with a fit, 5 the one past hope.
    assert worth_fitting(depths) == (6, 7, 5, 8)
    assert set(worth_fitting(depths[:3])) == {8, 7}
    assert worth_fitting(depths[:1]) == ()
    # Near-lossless without.
    assert worth_fitting([depths[0], made(8, 0.009), made(7, 0.011)]) == (7,)


def test_the_deepest_within_goes_by_the_fit_where_there_is_one():
    depths = [made(9, 0.0), made(8, 0.03), made(7, 0.1), made(6, 0.3)]
    assert getattr(deepest_within(budget.BALANCED, depths), "boundary", None) == 8
    fitted = with_fits(depths, {7: made(7, 0.03).quality, 8: made(8, 0.01).quality})
    assert [depth.fitted is not None for depth in fitted] == [False, True, True, False]
    assert getattr(deepest_within(budget.BALANCED, fitted), "boundary", None) == 7
    assert deepest_within(replace(budget.BALANCED, max_kl=-1.0), fitted) is None


def is_within(row):
    limits = budget.BALANCED
    return (
        row["kl_mean"] <= limits.max_kl
        and row["copy_ppl_ratio"] <= limits.max_copy_ratio
        and (row["induction_retention"] or 1) >= limits.least_retention
    )


def made(boundary: int, kl: float, retention: float = 1.0) -> Depth:
    """Of a model of ten layers, what a budget looks at."""
    quality = SimpleNamespace(
        boundary=boundary,
        kl_mean=Estimate(kl, 0.0),
        copy_ppl_ratio=Estimate(1.0, 0.0),
        induction_retention=Estimate(retention, 0.0),
    )
    return Depth(10 - boundary, 1.5, quality, 0.0)  # type: ignore[arg-type]
