"""Test the estimated time left for all stages of a conversion."""

from types import SimpleNamespace

import pytest

from pop_converter.base.progress import Unit, Watch
from pop_local.measure.budget import BALANCED
from pop_local.workflows.conversion import stages
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.goals import Boundary, Within
from pop_local.workflows.conversion.stages import (
    ExpectedStage,
    planned_seconds,
    planned_stages,
    with_time_left,
)
from support.synthetic import make_gguf

STAGES = (
    ExpectedStage("Sampling text", 10),
    ExpectedStage("Fitting", 60),
    *[ExpectedStage("Measuring boundary", 10)] * 3,
    ExpectedStage("Writing", 0),
)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def left(clock) -> list[float]:
    return []


@pytest.fixture
def watch(left) -> Watch:
    return with_time_left(Watch(on_left=left.append), STAGES)


def test_the_time_left_covers_all_stages(clock, left, watch):
    advance = watch.stage("Sampling text")
    advance(0, 2)
    clock.now_s = 4.0
    advance(1, 2)
    assert left == []
    clock.now_s = 20.0
    advance(2, 2)
    assert left.pop() == pytest.approx(20 * 90 / 10)
    advance = watch.stage("Fitting")
    clock.now_s = 110.0
    advance(1, 2)
    assert left.pop() == pytest.approx(110 * 60 / 40)


def test_skipped_stages_take_no_time(clock, left, watch):
    advance = watch.stage("Fitting")
    clock.now_s = 30.0
    advance(1, 2)
    assert left.pop() == pytest.approx(30 * 60 / 30)
    watch.stage("Something else")(1, 2)
    assert left.pop() == pytest.approx(30 * 30 / 30)
    advance = watch.stage("Writing", Unit.BYTES)
    advance(1, 2)
    assert left.pop() == 0


def test_more_candidates_than_expected_only_take_their_own_time(clock, left, watch):
    clock.now_s = 10.0
    for boundary in range(5):
        watch.stage(f"Measuring boundary {boundary}")(1, 1)
    assert left == [10 * 20 / 10, 10 * 10 / 20, 0, 0, 0]


@pytest.mark.parametrize("goal", [Within(BALANCED), Within(BALANCED, Boundary(4)), Boundary(4)])
def test_the_plan_names_the_stages_of_its_goal(tmp_path, monkeypatch, goal):
    monkeypatch.setattr(stages, "macs_per_s", lambda: 1e6)
    planned = plan_conversion(make_gguf(tmp_path / "m.gguf", "llama"), None, ConvertOptions(goal))
    names = [stage.name for stage in planned_stages(planned)]
    assert names[:2] == ["Sampling text", "Fitting"] and names[-1] == "Writing and verifying"
    assert names.count("Measuring boundary") == (
        0 if isinstance(goal, Boundary) else 6 if goal.at is None else 3
    )
    seconds, fit_seconds = planned_seconds(planned), planned.fit_seconds
    assert seconds is not None and planned.fit_work is not None and fit_seconds
    assert sum(planned.fit_work) / 1e6 < seconds


def test_nothing_is_estimated_with_distillation(tmp_path):
    pytest.importorskip("torch")
    from pop_local.research.distilled import Distiller

    options = ConvertOptions(Boundary(4), distiller=Distiller)
    planned = plan_conversion(make_gguf(tmp_path / "m.gguf", "llama"), None, options)
    assert planned_stages(planned) == [] and planned_seconds(planned) is None
