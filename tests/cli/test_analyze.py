"""Test `pop-local analyze`: options, output, refusals, and the real models' figures."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from pop_base.errors import PlanError
from pop_local.measure import budget
from pop_local.measure.budget import boundaries
from pop_local.measure.estimate import Estimate
from pop_local.measure.quality import Quality
from pop_local.research import analyze as research
from pop_local.research.analyze import DepthCost, deepest_within, worth_measuring
from support.analyzed import analyze, report
from support.converted import paired
from support.synthetic import make_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("analyze") / "tiny.gguf", "llama", n_layer=6)


# --- output


def test_json_contains_all_boundaries(model):
    found = report(model)
    assert found == report(model)
    assert [row["boundary"] for row in found["boundaries"]] == [5, 4, 3]
    last = found["boundaries"][0]
    assert last["quality"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert last["projection"] == "own"
    assert {"speedup_limit", "induction_retention"} <= set(last)


def test_prints_one_table_and_findings_to_a_pipe(model):
    done = analyze(model)
    assert done.exit_code == 0, done.output
    head, rule, *rows = done.stdout.partition("\n\n")[0].splitlines()
    assert "Induction" in head and "───" in rule
    assert [row.split()[0] for row in rows] == ["3", "4", "5"]
    assert "budget" in done.stdout.splitlines()[-1]


def test_stops_measuring_after_copying_is_lost(model, monkeypatch):
    monkeypatch.setattr(research, "may_copy", lambda retention: False)
    first, *others = report(model)["boundaries"]
    assert first["quality"] is not None
    assert [(row["projection"], row["quality"]) for row in others] == [(None, None)] * 2
    _, _, *rows = analyze(model).stdout.partition("\n\n")[0].splitlines()
    assert [("own" in row) for row in rows] == [False, False, True]


# --- refusals


def test_rejects_converted_file(tmp_path):
    base = make_gguf(tmp_path / "base.gguf", "llama", n_layer=6)
    done = analyze(paired(base, tmp_path, "fitted", boundary=3).single)
    assert done.exit_code == 1
    message = " ".join(done.stderr.split())
    assert "is already converted" in message
    assert "use the original model" in message


# --- boundaries


@pytest.mark.parametrize(("n_layer", "deepest"), [(2, 1), (3, 1), (18, 9), (30, 15)])
def test_probes_deeper_half(n_layer, deepest):
    found = boundaries(SimpleNamespace(n_layer=n_layer, n_deepstack=0))  # type: ignore[arg-type]
    assert (found[0], found[-1]) == (n_layer - 1, deepest)


def test_rejects_model_of_one_layer():
    with pytest.raises(PlanError):
        boundaries(SimpleNamespace(n_layer=1))  # type: ignore[arg-type]


# --- fits


@pytest.fixture
def balanced(monkeypatch):
    """Raise the perplexity limit, which random weights exceed by chance."""
    monkeypatch.setattr(budget, "BALANCED", replace(budget.BALANCED, max_ppl_ratio=2.0))


@pytest.mark.usefixtures("balanced")
def test_fits_each_boundary_and_selects_one(model):
    found = report(model)
    deepest = found["boundaries"][-1]
    assert [row["projection"] for row in found["boundaries"]] == ["own", "fitted", "fitted"]
    assert deepest["quality"]["n_pruned"] > 0
    assert found["calibration"]["n_tokens"] == 4096
    # Random weights lose little, so the deepest boundary is within the budget.
    assert found["chosen"]["boundary"] == deepest["boundary"] == 3
    assert found["chosen"]["projection"] == "fitted"
    assert found["chosen"]["budget"]["quality"] == "balanced"


@pytest.mark.usefixtures("balanced")
def test_describes_selection_as_estimate(model):
    done = analyze(model)
    assert done.exit_code == 0, done.output
    [row] = [line for line in done.stdout.splitlines() if line.endswith("balanced")]
    assert row.split()[0] == "3"
    assert "4,096 tokens" in done.stdout
    assert "The balanced budget allows skipping layers 3 and up" in done.stdout
    assert "The loss was measured on 3 windows." in done.stdout


@pytest.mark.usefixtures("balanced")
def test_selects_no_boundary_outside_budget(model, monkeypatch):
    monkeypatch.setattr(budget, "BALANCED", replace(budget.BALANCED, max_kl=-1.0))
    assert report(model)["chosen"]["boundary"] is None
    done = analyze(model)
    assert "The balanced budget does not allow any of the measured boundaries." in done.stdout


def _boundaries(depths: list[DepthCost]) -> list[int]:
    return [depth.boundary for depth in worth_measuring(depths)]


def test_measures_prose_until_first_boundary_outside_budget():
    retentions = (1, 0.99, 0.95, 0.9, 0.3, 0.1)
    depths = [made(9 - n, retention=kept) for n, kept in enumerate(retentions)]
    # Boundary 6 is the deepest within the balanced budget. Boundary 5 ends the measurements.
    assert _boundaries(depths) == [9, 8, 7, 6, 5]
    assert set(_boundaries(depths[:3])) == {9, 8, 7}
    # Boundary 9 saves too little work.
    assert set(_boundaries([replace(depths[0], speedup_limit=1.04), *depths[1:3]])) == {8, 7}
    # A model that does not copy is measured at every boundary.
    assert _boundaries([replace(d, retention=None) for d in depths]) == [9, 8, 7, 6, 5, 4]


def test_deepest_within_requires_measured_prose():
    depths = [made(9), made(8), made(7), made(6)]
    assert deepest_within(budget.BALANCED, depths) is None
    kls = {9: 0.0, 8: 0.03, 7: 0.1}
    measured = [
        replace(depth, quality=cost(depth.boundary, kls[depth.boundary])) for depth in depths[:3]
    ]
    assert getattr(deepest_within(budget.BALANCED, [*measured, depths[3]]), "boundary", None) == 8
    assert deepest_within(replace(budget.BALANCED, max_kl=-1.0), measured) is None


def made(boundary: int, retention: float = 1.0) -> DepthCost:
    """Return the cost of a boundary in a model of ten layers."""
    return DepthCost(boundary, 10 - boundary, 1.5, Estimate(retention, 0.0))


def cost(boundary: int, kl: float) -> Quality:
    """Return a quality with the figures that a budget limits."""
    quality = SimpleNamespace(
        boundary=boundary,
        kl_mean=Estimate(kl, 0.0),
        ppl_ratio=Estimate(1.0, 0.0),
        copy_ppl_ratio=Estimate(1.0, 0.0),
        induction_retention=Estimate(1.0, 0.0),
    )
    return cast("Quality", quality)
