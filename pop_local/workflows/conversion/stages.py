"""A conversion's planned stages and the work in each stage, for estimating the remaining time."""

from pop_local.calibration.needs import FitWork, reading_work
from pop_local.measure.lookups import LookupSettings
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import QualitySettings
from pop_local.workflows.conversion.conversion_plan import Conversion
from pop_local.workflows.conversion.full_model import N_DOCUMENTS, N_WINDOWS
from pop_local.workflows.events import PlannedStage

# Typical number of candidates whose lookups are measured.
_N_LOOKED_UP = 3
# Number of multiply-accumulates that take as long as writing a byte and reading it back.
_WRITING = 100


def fit_stages(work: FitWork | None, n_most: int = 1) -> tuple[PlannedStage, ...]:
    """Return the stages of a fit that runs up to `n_most` times."""
    if work is None:
        return ()
    sampling = (PlannedStage("Sampling text", work.sampling),) if work.sampling else ()
    return (*sampling, PlannedStage("Fitting", work.reading + work.solving, n_most))


def planned_stages(planned: Conversion) -> tuple[PlannedStage, ...]:
    """Return a conversion's possible stages, with their work in multiply-accumulates.

    The result is empty if the work cannot be counted or includes distillation.
    """
    if planned.not_counted or planned.options.distiller:
        return ()
    settings, plan = QualitySettings(), planned.deepest
    window = reading_work(plan, settings.n_context + settings.n_continuation)
    draws = settings.n_draws * reading_work(plan, 2 * N_REPEATED)
    lookups = N_DOCUMENTS * reading_work(plan, LookupSettings().n_ctx)
    is_searched = not planned.is_named
    # The steps of `undecided` double until one is too long, and are then halved.
    n_tried = 2 * len(planned.plans).bit_length() - 1 if is_searched else 1
    whole = N_WINDOWS * window + draws
    return (
        *fit_stages(planned.fit_work, 2 if is_searched else 1),
        PlannedStage("Running the full model", whole),
        PlannedStage("Measuring", whole),
        PlannedStage("Measuring boundary", whole, n_tried),
        PlannedStage("Running lookups", lookups),
        PlannedStage("Running lookups on the full model", lookups),
        PlannedStage("Running lookups, boundary", lookups, _N_LOOKED_UP),
        PlannedStage(planned.writing_stage, _WRITING * planned.sizes.output_bytes),
    )
