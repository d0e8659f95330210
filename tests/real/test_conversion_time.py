"""Replay measured conversions: the boundaries that `convert` measures, and its time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pop_converter.base.progress import Progress, Watch
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_local.measure import budget as budgets
from pop_local.measure.budget import BALANCED
from pop_local.measure.estimate import Estimate
from pop_local.workflows.conversion import search as searching
from pop_local.workflows.conversion import stages
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.search import Candidate, Search
from pop_local.workflows.conversion.stages import planned_stages, with_time_left

SHARES = {DeepRows.NAMES: 0.17, DeepRows.SPELLING: 0.1, DeepRows.NONE: 0.0}


@dataclass(frozen=True)
class Run:
    """A measured search: each stage's mean duration in seconds, and its verdicts.

    `text` and `lookups` are the deepest boundaries that pass on text and on look-ups. No rule with
    fewer deep rows passes the look-ups.
    """

    opening_s: float
    sampling_s: float
    fitting_s: float
    full_text_s: float
    text_s: float
    full_lookups_s: float
    lookups_s: float
    text: int
    lookups: int


class Replay:
    """A search whose measurements only let time pass."""

    def __init__(self, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.now_s, self.asked = run, 0.0, list[str]()
        self.shown: list[tuple[float, float]] = []
        monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(searching, "measure_against", self._measure)
        monkeypatch.setattr(budgets, "is_inside", lambda budget, found: found.is_inside)
        monkeypatch.setattr(budgets, "keeps_lookups", lambda budget, found: found.is_inside)
        planned = plan_conversion(model, None, ConvertOptions(output="sidecar"))
        watch = Watch(on_left=lambda left: self.shown.append((self.now_s, left)))
        self.watch = with_time_left(watch, planned_stages(planned))
        runner: Any = SimpleNamespace(watch=self.watch, tried=self._tried)
        full: Any = self
        fitter: Any = SimpleNamespace(distiller=None)
        self.search = Search(runner, BALANCED, fitter, full, planned.tried)
        self.search.plain = [
            Candidate(replace(plan, deep_share=SHARES[plan.deep_rows]))
            for plan in self.search.plans
        ]
        monkeypatch.setattr(self.search, "fit", self._fit)
        self.now_s = run.opening_s

    def pass_time(self, advance: Progress, seconds: float) -> None:
        for done in range(1, 101):
            self.now_s += seconds / 100
            advance(done, 100)

    def deep_share(self, rule: DeepRows) -> float:
        return SHARES[rule]

    @cached_property
    def reference(self) -> None:
        self.pass_time(self.watch.stage("Running the full model"), self.run.full_text_s)

    @cached_property
    def lookups(self) -> Any:
        advance = self.watch.stage("Running look-ups on the full model")
        self.pass_time(advance, self.run.full_lookups_s)
        return SimpleNamespace(ask=self._ask, compare=lambda answers: answers[0])

    def _fit(self, wanted: Any) -> None:
        self.pass_time(self.watch.stage("Sampling text"), self.run.sampling_s)
        self.pass_time(self.watch.stage("Fitting"), self.run.fitting_s)
        fitted: Any = "fitted"
        for candidate in self.search.plain:
            candidate.fitted = fitted

    @contextmanager
    def _tried(self, plan: Plan, fitted: Any) -> Iterator[Plan]:
        yield plan

    def _measure(self, reference: None, plan: Plan, pruning: Any, advance: Progress, _: Any) -> Any:
        self.pass_time(advance, self.run.text_s)
        inside = plan.boundary >= self.run.text
        return SimpleNamespace(is_inside=inside, kl_mean=Estimate(0.01, 0.001))

    def _ask(self, plan: Plan, pruning: Any, advance: Progress, answers: list[Any]) -> None:
        self.asked.append(f"{plan.boundary} {plan.deep_rows}")
        self.pass_time(advance, self.run.lookups_s)
        named = plan.deep_rows is DeepRows.NAMES
        answers.append(SimpleNamespace(is_inside=named and plan.boundary >= self.run.lookups))


# Both runs used one thread of an AMD EPYC (Zen 4) on November 30, 2026.
SMOLLM2 = Run(3.1, 29.9, 36.4, 18.0, 14.6, 51.0, 47.9, text=20, lookups=22)
GEMMA = Run(4.3, 41.1, 25.0, 36.0, 25.9, 58.7, 58.4, text=11, lookups=17)


@pytest.mark.parametrize(
    ("model", "run", "asked"),
    [
        ("smollm2", SMOLLM2, [20, 21, 23, 22]),
        ("gemma", GEMMA, [11, 12, 14, 17, 16]),
    ],
)
def test_the_time_left_is_within_a_third_at_half_way(request, monkeypatch, model, run, asked):
    replay = Replay(request.getfixturevalue(model), run, monkeypatch)
    replay.search.bisect()
    assert replay.asked == [f"{boundary} names" for boundary in asked]
    replay.search.trade_rows()
    assert replay.search.fastest().boundary == run.lookups
    half_s = replay.now_s / 2
    left_s = [left for now_s, left in replay.shown if now_s <= half_s][-1]
    assert left_s == pytest.approx(half_s, rel=1 / 3)


@pytest.mark.parametrize("lookups", range(17, 30))
def test_candidates_that_passed_only_on_text_are_not_chosen(smollm2, monkeypatch, lookups):
    """Expect the deepest boundary that passes the look-ups, after several passed on text."""
    replay = Replay(smollm2, replace(SMOLLM2, text=16, lookups=lookups), monkeypatch)
    replay.search.bisect()
    replay.search.trade_rows()
    assert replay.search.fastest().boundary == lookups
    assert all(each.boundary >= lookups for each in replay.search.inside)


def test_a_traded_candidate_without_look_ups_is_not_chosen(smollm2, monkeypatch):
    """A stop can end a search after a candidate's text, before its look-ups."""
    replay = Replay(smollm2, SMOLLM2, monkeypatch)
    replay.search.bisect()
    best = replay.search.fastest()
    traded = Candidate(replace(best.plan, deep_rows=DeepRows.SPELLING, deep_share=0.1), best.fitted)
    replay.search.judge(traded)
    replay.search.traded[str(traded)] = traded
    assert traded.is_inside and replay.search.fastest() is best
    replay.search.trade_rows()
    assert traded.lookups is not None and replay.search.fastest() is best
