"""Boundaries that pruning may have, and how much of copying each keeps without a fit."""

from pop_converter.architecture.shape import ModelShape
from pop_converter.popfile.plan import Plan
from pop_local.base.errors import PlanError
from pop_local.base.progress import Progress, counting
from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, as_planned, forced
from pop_local.measure.probes import measure_induction, read_repeated
from pop_local.measure.quality import QualitySettings, retention

# A retention to some percent, in seconds.
_LOOK = QualitySettings(n_draws=2)


def boundaries(shape: ModelShape, divisor: int = 2) -> tuple[int, ...]:
    """Return the boundaries from the last layer alone down to half of all, or to n_layer / divisor.

    Layers that take features of images are kept. Raises PlanError for a model of one layer.
    """
    if shape.n_layer < 2:
        raise PlanError("a model of one layer has none that could be skipped")
    lowest = max(1, shape.n_deepstack, shape.n_layer // divisor)
    return tuple(range(shape.n_layer - 1, lowest - 1, -1))


def own_retention(model: PopModel, plan: Plan, on_progress: Progress) -> Estimate | None:
    """Measure `Quality.induction_retention` of the plan's boundary without a fit, in seconds.

    `on_progress` counts draws.
    """
    as_planned(model, plan)
    with forced(model) as reader:
        ran = counting(2 * _LOOK.n_draws, on_progress)
        repeated = read_repeated(reader, _LOOK.n_draws, _LOOK.seed, ran)
        pruning = Pruning(plan.boundary, _LOOK.mode)
        [found] = measure_induction(reader, repeated, [pruning], ran)
    return retention(repeated, found)
