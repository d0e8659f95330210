"""Check the time left that `convert` estimates against a measured conversion of SmolLM2."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from pop_converter.base.progress import Unit, Watch
from pop_local.calibration.fit_options import FitOptions
from pop_local.workflows.conversion import stages
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.stages import planned_stages, with_time_left

# The stages of a search with 4,096 tokens, 4 windows and 1 document, and their starts in seconds of
# processor time (one thread of an AMD EPYC, Zen 4, November 30, 2026).
MEASURED = (
    ("Sampling text", 1.2),
    ("Fitting", 12.9),
    ("Running the full model", 28.2),
    ("Measuring boundary 20", 35.6),
    ("Measuring boundary 19", 40.9),
    ("Running look-ups on the full model", 46.3),
    ("Running look-ups at boundary 20 (names)", 52.3),
    ("Measuring boundary 20", 58.7),
    ("Measuring boundary 21", 64.0),
    ("Running look-ups at boundary 21", 69.4),
    ("Measuring boundary 22", 75.8),
    ("Running look-ups at boundary 22", 81.2),
    ("Reading the model", 87.5),
    ("", 87.6),
)


def test_the_time_left_is_within_a_third_at_half_way(smollm2, monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(stages, "N_WINDOWS", 4)
    monkeypatch.setattr(stages, "N_DOCUMENTS", 1)
    options = ConvertOptions(fit=FitOptions(4096), output="sidecar")
    left: list[float] = []
    expected = planned_stages(plan_conversion(smollm2, None, options))
    watch = with_time_left(Watch(on_left=left.append), expected)
    end_s = MEASURED[-1][1]
    at_s = end_s / 2
    for (name, start_s), (_, next_s) in pairwise(MEASURED):
        clock.now_s = start_s
        advance = watch.stage(name, Unit.TOKENS)
        clock.now_s = min(at_s, next_s)
        advance(round(1000 * (clock.now_s - start_s) / (next_s - start_s)), 1000)
        if clock.now_s == at_s:
            break
    assert left[-1] == pytest.approx(end_s - at_s, rel=1 / 3)
