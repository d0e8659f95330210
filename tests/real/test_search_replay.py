"""Replay searches with verdicts from tests: the boundaries that `convert` measures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pop_base.progress import Progress, Watch
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_local.measure import budget as budgets
from pop_local.measure.budget import BALANCED
from pop_local.measure.estimate import Estimate
from pop_local.workflows.conversion import search as searching
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.search import Candidate, Search

SHARES = {DeepRows.NAMES: 0.17, DeepRows.SPELLING: 0.1, DeepRows.NONE: 0.0}


class Replay:
    """A search over a model's plans with given verdicts instead of measurements.

    `text` and `lookups` are the deepest boundaries that pass on text and on look-ups. No rule with
    fewer deep rows passes the look-ups.
    """

    def __init__(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, *, text: int, lookups: int
    ) -> None:
        self.least_text, self.least_lookups = text, lookups
        monkeypatch.setattr(searching, "measure_against", self._measure)
        monkeypatch.setattr(budgets, "is_inside", lambda budget, quality: quality.is_inside)
        monkeypatch.setattr(budgets, "keeps_lookups", lambda budget, lookups: lookups.is_inside)
        planned = plan_conversion(model, None, ConvertOptions(output="sidecar"))
        runner: Any = SimpleNamespace(watch=Watch(), tried=self._tried)
        full: Any = self
        fitter: Any = SimpleNamespace(distiller=None)
        self.search = Search(runner, BALANCED, fitter, full, planned.tried)
        self.search.plain = [
            Candidate(replace(plan, deep_share=SHARES[plan.deep_rows]))
            for plan in self.search.plans
        ]
        monkeypatch.setattr(self.search, "fit", self._fit)

    reference = None

    def deep_share(self, rule: DeepRows) -> float:
        return SHARES[rule]

    @property
    def lookups(self) -> Any:
        return SimpleNamespace(ask=self._ask, compare=lambda answers: answers[0])

    def _fit(self, wanted: Any) -> None:
        fitted: Any = "fitted"
        for candidate in self.search.plain:
            candidate.fitted = fitted

    @contextmanager
    def _tried(self, plan: Plan, fitted: Any) -> Iterator[Plan]:
        yield plan

    def _measure(self, reference: None, plan: Plan, *_: Any) -> Any:
        is_inside = plan.boundary >= self.least_text
        return SimpleNamespace(is_inside=is_inside, kl_mean=Estimate(0.01, 0.001))

    def _ask(self, plan: Plan, pruning: Any, advance: Progress) -> list[Any]:
        is_named = plan.deep_rows is DeepRows.NAMES
        return [SimpleNamespace(is_inside=is_named and plan.boundary >= self.least_lookups)]


@pytest.mark.parametrize("lookups", range(17, 30))
def test_rejects_candidates_that_passed_only_on_text(smollm2, monkeypatch, lookups):
    """Expect the deepest boundary that passes the look-ups, after several passed on text."""
    replay = Replay(smollm2, monkeypatch, text=16, lookups=lookups)
    replay.search.bisect()
    replay.search.trade_rows()
    assert replay.search.fastest().boundary == lookups
    assert all(candidate.boundary >= lookups for candidate in replay.search.inside)


def test_rejects_traded_candidate_without_lookups(smollm2, monkeypatch):
    """A stop can end a search after a candidate's text, before its look-ups."""
    replay = Replay(smollm2, monkeypatch, text=20, lookups=22)
    replay.search.bisect()
    best = replay.search.fastest()
    traded = Candidate(replace(best.plan, deep_rows=DeepRows.SPELLING, deep_share=0.1), best.fitted)
    replay.search.judge(traded)
    replay.search.traded[str(traded)] = traded
    assert traded.is_inside and replay.search.fastest() is best
    replay.search.trade_rows()
    assert traded.lookups is not None and replay.search.fastest() is best
