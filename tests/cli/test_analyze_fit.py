"""Test `pop-local analyze` with a fit: the fitted boundaries, the choice, the memory."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from pop_local.measure import budget
from pop_local.measure.estimate import Estimate
from pop_local.measure.quality import Quality
from pop_local.research.analyze import DepthCost, deepest_within, worth_measuring
from support.analyzed import analyze, report
from support.synthetic import make_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("analyze") / "tiny.gguf", "llama", n_layer=6)


@pytest.fixture(autouse=True)
def of_random_weights(monkeypatch):
    """Raise the perplexity limit, which random weights exceed by chance."""
    monkeypatch.setattr(budget, "BALANCED", replace(budget.BALANCED, max_ppl_ratio=2.0))


def test_each_boundary_is_fitted_and_one_is_chosen(model):
    found = report(model)
    deepest = found["boundaries"][-1]
    assert [row["projection"] for row in found["boundaries"]] == ["own", "fitted", "fitted"]
    assert deepest["quality"]["n_pruned"] > 0
    assert found["calibration"]["n_tokens"] == 4096
    # Random weights lose little, so the deepest boundary is within the budget.
    assert found["chosen"]["boundary"] == deepest["boundary"] == 3
    assert found["chosen"]["projection"] == "fitted"
    assert found["chosen"]["budget"]["quality"] == "balanced"


def test_the_choice_is_named_an_estimate(model):
    done = analyze(model, "--markdown")
    assert done.exit_code == 0, done.output
    [row] = [
        line for line in done.stdout.splitlines() if line.startswith("|") and "balanced" in line
    ]
    assert row.split("|")[1].strip() == "3"
    assert "4,096 tokens" in done.stdout
    assert "The balanced budget allows skipping layers 3 and up" in done.stdout
    assert "The loss was measured on 3 windows." in done.stdout


def test_no_boundary_is_chosen_outside_the_budget(model, monkeypatch):
    monkeypatch.setattr(budget, "BALANCED", replace(budget.BALANCED, max_kl=-1.0))
    assert report(model)["chosen"]["boundary"] is None
    done = analyze(model)
    assert "The balanced budget does not allow any of the measured boundaries." in done.stdout


def _boundaries(depths: list[DepthCost]) -> list[int]:
    return [each.boundary for each in worth_measuring(depths)]


def test_prose_is_measured_down_to_one_boundary_past_hope():
    retentions = (1, 0.99, 0.95, 0.9, 0.3, 0.1)
    depths = [made(9 - n, retention=kept) for n, kept in enumerate(retentions)]
    # Boundary 6 is the deepest within the balanced budget. Boundary 5 ends the measurements.
    assert _boundaries(depths) == [9, 8, 7, 6, 5]
    assert set(_boundaries(depths[:3])) == {9, 8, 7}
    # Boundary 9 saves too little work.
    assert set(_boundaries([replace(depths[0], speedup_limit=1.04), *depths[1:3]])) == {8, 7}
    # A model that does not copy is measured at every boundary.
    assert _boundaries([replace(d, retention=None) for d in depths]) == [9, 8, 7, 6, 5, 4]


def test_the_deepest_within_is_among_those_measured_on_prose():
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
