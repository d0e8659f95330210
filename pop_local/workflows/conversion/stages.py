"""A conversion's expected stages and estimated duration."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from pop_converter.base.progress import Unit, Watch
from pop_local.calibration.needs import FitWork, macs_per_s, reading_work
from pop_local.measure.budget import undecided
from pop_local.measure.lookups import LookupSettings
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.conversion.conversion_plan import Conversion
from pop_local.workflows.conversion.full_model import N_DOCUMENTS, N_WINDOWS

# Number of prompt tokens that take as long to read as a look-up's answer (SmolLM2, Zen 4).
_TOKENS_PER_LOOKUP = 130
# Cost of measuring a boundary relative to the full model (SmolLM2, Zen 4).
_BOUNDARY_COST = 0.7
# Number of multiply-accumulates that take as long as writing a byte and reading it back.
_WRITING = 100
# Seconds of work that must pass before the rate is estimated.
_LEAST_S = 5.0
# Expected number of candidates after the first that runs look-ups. Small models need 0 to 5.
N_RETRIES = 1

# Names of stages, or their beginnings.
MEASURING = "Measuring boundary"
FULL_LOOKUPS = "Running look-ups on the full model"
RUNNING_LOOKUPS = "Running look-ups at boundary"


class ExpectedStage(NamedTuple):
    """A stage whose name starts with `name`. `work`: the stage's compute cost (see FitWork)."""

    name: str
    work: float


def n_expected(boundaries: Sequence[int]) -> int:
    """Estimate the number of boundaries that bisection will measure after `boundaries[0]`.

    The estimate is the mean of the numbers for two cases. If the loss at `boundaries[0]` is within
    the budget, only deeper boundaries are searched. Otherwise, half of the boundaries are searched.
    """
    n_if_inside = sum(each < boundaries[0] for each in boundaries).bit_length()
    return (n_if_inside + (len(boundaries) // 2).bit_length() + 1) // 2


def planned_stages(planned: Conversion) -> list[ExpectedStage]:
    """Return the expected stages in order, or [] if fits are distilled or the cost is unknown."""
    if planned.not_counted or planned.options.distiller:
        return []
    settings, asked, plan = QualitySettings(), LookupSettings(), planned.deepest
    window = reading_work(plan, settings.n_context + settings.n_continuation)
    read = N_WINDOWS * window + settings.n_draws * reading_work(plan, 2 * N_REPEATED)
    n_tokens = asked.n_tokens + asked.n_per_document * _TOKENS_PER_LOOKUP
    lookups = N_DOCUMENTS * reading_work(plan, n_tokens)
    work = planned.fit_work or FitWork(0, 0)
    stages = [ExpectedStage("Sampling text", work.sampling), ExpectedStage("Fitting", work.fitting)]
    tried = ExpectedStage(MEASURING, _BOUNDARY_COST * read)
    looked_up = ExpectedStage(RUNNING_LOOKUPS, lookups)
    if planned.budget is not None:
        stages.append(ExpectedStage("Running the full model", read))
        n_more = n_expected(undecided([plan.boundary for plan in planned.tried], {}))
        stages += [tried] * (n_more + 1)
        stages += [ExpectedStage(FULL_LOOKUPS, lookups), looked_up]
        n_after = min(N_RETRIES, n_more) + len(plan.deep_rows.fewer)
        stages += [tried, looked_up] * n_after
    elif planned.fit_work:
        stages += [ExpectedStage("Measuring", read), ExpectedStage("Running look-ups", lookups)]
    return [*stages, ExpectedStage(planned.writing_stage, _WRITING * planned.sizes.output_bytes)]


def planned_seconds(planned: Conversion) -> float | None:
    """Return a conversion's estimated duration in seconds, or None if it cannot be estimated."""
    work = sum(stage.work for stage in planned_stages(planned))
    return work / macs_per_s() if work else None


def with_time_left(watch: Watch, stages: Sequence[ExpectedStage]) -> Watch:
    """Return a Watch that also reports the time left, estimated from the rate so far."""
    known = {stage.name: stage for stage in stages}
    began_s, ahead, work, done_work, share = time.monotonic(), [*stages], 0.0, 0.0, 0.0

    def begin(name: str, unit: Unit) -> None:
        nonlocal ahead, work, done_work, share
        done_work, work, share = done_work + share * work, 0.0, 0.0
        if stage := next((each for each in stages if name.startswith(each.name)), None):
            work = stage.work
            # Expected stages that precede this one were skipped or have finished.
            if stage in ahead:
                ahead = ahead[ahead.index(stage) + 1 :]
        watch.on_stage(name, unit)

    def expect(names: Sequence[str]) -> None:
        nonlocal ahead
        ahead = [*(known[name] for name in names if name in known), *stages[-1:]]

    def advance(done: int, total: int) -> None:
        nonlocal share
        share = done / total if total else 0.0
        elapsed_s, passed = time.monotonic() - began_s, done_work + share * work
        if passed and elapsed_s >= _LEAST_S:
            left = (1 - share) * work + sum(stage.work for stage in ahead)
            watch.on_left(elapsed_s * left / passed)
        watch.on_progress(done, total)

    return replace(watch, on_stage=begin, on_progress=advance, on_expected=expect)
