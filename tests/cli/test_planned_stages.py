"""Test that workflows announce each stage before it starts."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from pop_local.calibration import needs
from pop_local.calibration.fit_options import FitOptions
from pop_local.measure.budget import BALANCED
from pop_local.research import layer_analysis as analyses
from pop_local.research.layer_analysis import AnalyzeOptions
from pop_local.workflows import benchmark
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.convert_model import convert
from pop_local.workflows.conversion.goals import Boundary, Goal, Within
from pop_local.workflows.events import PlannedStage, Unit, Watch
from pop_local.workflows.hardware import Hardware

ONE_THREAD = Hardware(n_threads=1, n_gpu_layers=0)
LOOSE = replace(BALANCED, max_kl=50.0, max_ppl_ratio=1e3, max_copy_ratio=1e3, max_lost_lookups=1.0)

pytestmark = pytest.mark.slow


class Followed:
    """Record of the announced stages, and of the number of times that each stage started."""

    def __init__(self) -> None:
        self.begun: dict[PlannedStage, int] = {}
        self.watch = Watch(on_stages=self._set_out, on_stage=self._begin)

    def _set_out(self, steps: Sequence[PlannedStage]) -> None:
        assert not self.begun and all(step.work > 0 for step in steps)
        self.begun = dict.fromkeys(steps, 0)

    def _begin(self, name: str, unit: Unit) -> None:
        found = [step for step in self.begun if name.startswith(step.name)]
        assert found, f"{name} was not announced"
        self.begun[max(found, key=lambda step: len(step.name))] += 1

    def check(self) -> None:
        assert sum(self.begun.values()) > 1
        for step, n in self.begun.items():
            # Writing and verifying are one planned stage.
            assert n <= step.n_most + (step is [*self.begun][-1]), step


@pytest.mark.parametrize("goal", [Within(LOOSE), Within(LOOSE, Boundary(4)), Boundary(4)])
def test_a_conversion_announces_its_stages(
    tiny, letters, tmp_path, monkeypatch, request, short_examination, goal: Goal
):
    if isinstance(goal, Within):
        request.getfixturevalue("short_search")
    monkeypatch.setattr(needs, "MAX_WIDE_COST", 1.0)
    followed = Followed()
    fit = FitOptions(2048, texts=(letters,))
    out = tmp_path / "out.gguf"
    options = ConvertOptions(goal, fit, hardware=ONE_THREAD)
    convert(tiny, out, options, force=True, watch=followed.watch)
    followed.check()


def test_an_analysis_announces_its_stages(tiny):
    followed = Followed()
    options = AnalyzeOptions(None, 64, 10, fit_tokens=2048)
    analyses.analyze(tiny, options, hardware=ONE_THREAD, watch=followed.watch)
    followed.check()


def test_no_stage_is_announced_with_distilling(tiny):
    from pop_local.research.distilled import Distiller
    from pop_local.workflows.conversion.stages import planned_stages

    planned = plan_conversion(tiny, None, ConvertOptions(Boundary(4), distiller=Distiller))
    assert planned_stages(planned) == ()


def test_sampling_takes_several_times_as_long_as_reading(tiny):
    planned = plan_conversion(tiny, None, ConvertOptions(Within(BALANCED)))
    assert planned.fit is not None and planned.needs is not None
    work = needs.fit_work(planned.plans, planned.fit, planned.needs)
    n_read = planned.fit.n_tokens(planned.deepest.shape.n_embd)
    n_sampled = planned.needs.n_sampled * needs.N_WINDOW
    assert work.sampling / n_sampled == pytest.approx(3 * work.reading / n_read)
    none = replace(planned.needs, n_sampled=0)
    assert needs.fit_work(planned.plans, planned.fit, none).sampling == 0


def test_a_benchmark_announces_the_choice_of_settings(tiny, monkeypatch):
    started: list[str] = []
    watch = Watch(on_stage=lambda name, unit: started.append(name))
    options = benchmark.BenchOptions((32,), 1, 4, None, ONE_THREAD)
    monkeypatch.setattr(benchmark, "has_kernels", lambda: True)
    benchmark.bench(str(tiny), None, options, watch)
    assert started == ["Trying llama.cpp's settings", "Measuring"]
