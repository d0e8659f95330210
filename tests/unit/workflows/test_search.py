"""Stages of a search, with verdicts from the tests instead of a model."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pop_base.errors import PopError
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.projection import Projection
from pop_local.measure.budget import BALANCED
from pop_local.measure.estimate import Estimate
from pop_local.workflows.conversion.conversion_plan import OverBudgetError
from pop_local.workflows.conversion.search import Candidate, Search
from support.calls import ignore
from support.shapes import read_shape
from support.synthetic import make_gguf

NONE, SPELLING, NAMES = DeepRows
N_LAYER = 8
SHARES = {NAMES: 0.45, SPELLING: 0.1, NONE: 0.0}


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Return a search over the fitted boundaries 7 to 2, and the candidates that it settles.

    `least`: the deepest boundary within the budget for each rule. Other rules are always outside.
    """
    shape = read_shape(make_gguf(tmp_path / "tiny.gguf", "llama", n_layer=N_LAYER))
    watch = SimpleNamespace(on_note=ignore)

    def macs(n_prompt: int, boundary: int | None, n_full: int) -> int:
        n_deep = N_LAYER - (N_LAYER if boundary is None else boundary)
        return 10**6 * (n_prompt * (N_LAYER - n_deep) + n_full * n_deep)

    def search(least: dict[DeepRows, int]) -> tuple[Search, list[str]]:
        settled: list[str] = []

        def settle(self: Search, candidate: Candidate) -> bool:
            settled.append(str(candidate))
            quality: Any = SimpleNamespace(kl_mean=Estimate(0.01, 0.001))
            lookups: Any = SimpleNamespace(lost=0, full=10)
            candidate.measured = quality
            bound = least.get(candidate.plan.deep_rows, N_LAYER)
            candidate.is_inside = candidate.boundary >= bound
            candidate.lookups = lookups
            return candidate.is_inside

        monkeypatch.setattr(Search, "settle", settle)
        rows: Any = {"projection": Projection.FITTED, "deep_rows": NAMES, "macs": macs}
        plans = [
            replace(make_plan(shape, boundary=each, **rows), deep_share=SHARES[NAMES])
            for each in range(7, 1, -1)
        ]
        full: Any = SimpleNamespace(deep_share=SHARES.get)
        runner: Any = SimpleNamespace(watch=watch)
        fitter: Any = SimpleNamespace(distiller=None)
        search_result = Search(runner, BALANCED, fitter, full, plans)
        fits: Any = "fitted"
        search_result.plain = [Candidate(plan, fits) for plan in plans]
        for candidate in search_result.plain:
            settle(search_result, candidate)
        settled.clear()
        return search_result, settled

    return search


@pytest.mark.parametrize(
    ("least", "settled", "fastest"),
    [
        ({NAMES: 4}, ["4 (spelling)", "5 (spelling)"], "4 (names)"),
        ({NAMES: 4, SPELLING: 4}, ["4 (spelling)", "4"], "4 (spelling)"),
        ({NAMES: 4, SPELLING: 5}, ["4 (spelling)", "5 (spelling)", "5"], "5 (spelling)"),
        ({NAMES: 4, SPELLING: 4, NONE: 4}, ["4 (spelling)", "4"], "4"),
    ],
)
def test_trades_deep_rows_for_layers_while_faster(searched, least, settled, fastest):
    search, candidates = searched(least)
    before = search.fastest().plan.speedup_limit
    search.trade_rows()
    assert str(search.fastest()) == fastest
    assert candidates == settled
    assert all(each.plan.speedup_limit > before for each in search.traded.values())


def test_share_of_deep_rows_counts_in_the_speedup_limit(searched):
    search, _ = searched({NAMES: 4})
    plan = search.plans[0]
    limits = [replace(plan, deep_share=share).speedup_limit for share in SHARES.values()]
    assert limits == sorted(limits) and len(set(limits)) == 3


def test_last_deep_row_rule_is_none():
    assert NAMES.fewer == (SPELLING, NONE)
    assert NONE.fewer == ()


def test_search_ends_at_first_candidate_outside_budget(searched):
    search, candidates = searched({NAMES: 4})
    search.distilled = [Candidate(it.plan, it.fitted) for it in search.plain]
    search.distill()
    assert candidates == ["7 own (names)", *(f"{boundary} (names)" for boundary in (6, 5, 4, 3))]


def test_failed_search_keeps_earlier_results(searched, monkeypatch):
    search, _ = searched({NAMES: 4})

    def fail(self: Search, candidate: Candidate) -> bool:
        raise PopError("no memory is left")

    notes: list[str] = []
    search.runner.watch.on_note = notes.append
    monkeypatch.setattr(Search, "settle", fail)
    search.distilled = [Candidate(search.plain[1].plan, search.plain[1].fitted)]
    search.distill()
    assert notes == ["Skipping boundary 6 (names): no memory is left"]
    assert str(search.fastest()) == "4 (names)"


def test_search_without_candidate_is_over_budget(searched):
    search, _ = searched({})
    for candidate in search.judged:
        figures: Any = candidate.quality
        figures.ppl_ratio = figures.copy_ppl_ratio = Estimate(2.0, 0.1)
    with pytest.raises(OverBudgetError, match=r"skipping 1 layer .* exceeds the budget") as caught:
        raise search._over()
    assert len(caught.value.trials) == 6
