"""The stages of a conversion ahead, and the work of each, so that one time left is of them all."""

from pop_local.calibration.needs import FitWork, reading_work
from pop_local.measure.lookups import LookupSettings
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.conversion.plan import Conversion
from pop_local.workflows.conversion.within import N_DOCUMENTS, N_WINDOWS
from pop_local.workflows.events import Step

# A boundary is measured in so many stages at the most, each on twice as many windows.
_N_PARTS = 3
# Candidates that are asked for look-ups.
_N_TRIED = 3
# Products in the time that a byte is written and read back.
_WRITING = 100


def fit_steps(work: FitWork | None, n_most: int = 1) -> tuple[Step, ...]:
    """Return the steps of a fit, which may come `n_most` times; none where there is none."""
    if work is None:
        return ()
    sampling = (Step("Sampling text", work.sampling),) if work.sampling else ()
    return (*sampling, Step("Fitting", work.reading + work.solving, n_most))


def course(planned: Conversion) -> tuple[Step, ...]:
    """Return the steps of a conversion at the most, in products of this machine.

    None where work cannot be counted, or distilling is part of it, whose time is not known.
    """
    if planned.not_counted or planned.is_distilled:
        return ()
    settings, plan, limits = QualitySettings(), planned.deepest, planned.goal.limits
    window = reading_work(plan, settings.n_context + settings.n_continuation)
    draws = settings.n_draws * reading_work(plan, 2 * N_REPEATED)
    asked = reading_work(plan, LookupSettings().n_ctx)
    is_searched = limits is not None and not planned.goal.is_named
    n_tried = len(planned.plans).bit_length() if is_searched else 1
    n_tried *= 2 if planned.n_few else 1
    whole = N_WINDOWS * window + draws
    return (
        Step("Trying the boundary without a fit", draws),
        *fit_steps(planned.fit_work, 2 if is_searched else 1),
        Step("Reading in full", whole),
        Step("Measuring", whole / _N_PARTS, n_parts=3 * _N_PARTS),
        Step("Measuring boundary", whole / _N_PARTS, n_tried, _N_PARTS),
        Step("Asking for look-ups in full", N_DOCUMENTS * asked, 2),
        Step("Asking for look-ups, boundary", N_DOCUMENTS * asked, 2 * _N_TRIED),
        Step(planned.output.stage, _WRITING * planned.sizes.output_bytes),
    )
