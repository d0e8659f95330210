"""Check the time left that `convert` estimates against a measured conversion of SmolLM2."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from pop_converter.base.progress import Unit, Watch
from pop_local.workflows.conversion import stages
from pop_local.workflows.conversion.conversion_plan import ConvertOptions, plan_conversion
from pop_local.workflows.conversion.stages import planned_stages, with_time_left

# The stages of a search with the default options, and their starts in seconds (one thread of an AMD
# EPYC, Zen 4, November 30, 2026).
MEASURED = (
    ("Sampling text", 4.8),
    ("Fitting", 38.4),
    ("Running the full model", 84.9),
    ("Measuring boundary 20", 109.2),
    ("Measuring boundary 19", 128.6),
    ("Running look-ups on the full model", 149.0),
    ("Running look-ups at boundary 20 (names)", 217.9),
    ("Measuring boundary 21", 286.7),
    ("Running look-ups at boundary 21 (names)", 307.5),
    ("Measuring boundary 23", 376.2),
    ("Measuring boundary 22", 397.6),
    ("Running look-ups at boundary 22 (names)", 417.6),
    ("Measuring boundary 22", 473.7),
    ("Running look-ups at boundary 22 (spelling)", 491.2),
    ("Measuring boundary 23", 548.6),
    ("Running look-ups at boundary 23", 567.0),
    ("Reading the model", 627.8),
    ("", 628.0),
)


def test_the_time_left_is_within_a_third_at_half_way(smollm2, monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    left: list[float] = []
    planned = plan_conversion(smollm2, None, ConvertOptions(output="sidecar"))
    expected = planned_stages(planned)
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
