"""The cheap look before any fit: where between the layers a budget may end."""

from dataclasses import replace

from converter.format import FITTED, Budget
from converter.plan import Plan
from converter.progress import Progress
from pop_local.engine.model import PopModel
from pop_local.measure.budget import Bracket, is_hopeless, is_promising
from pop_local.measure.depth import boundaries
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, forced, use_rule
from pop_local.measure.heldout import TextTokens
from pop_local.measure.probes import measure_induction, read_repeated
from pop_local.measure.quality import QualitySettings, measure_depths, retention, tokens_counted

# Enough to say where to begin.
LOOK = QualitySettings(n_windows=4, n_context=256, n_continuation=64, n_draws=2)


def find_bracket(
    model: PopModel,
    plan: Plan,
    budget: Budget,
    text_tokens: TextTokens,
    on_progress: Progress,
) -> Bracket:
    """Bisect the deeper half of the layers with their own projections, as `plan` prunes.

    `plan` is any of the model, its boundary does not count. `on_progress` gets (done_tokens,
    total_tokens), which may end early. The last layer alone is the shallowest: skipping it costs
    nothing.
    """
    as_planned(model, plan)
    order = boundaries(plan.shape)
    deepest = order[-1]
    promising, hopeless = 0, len(order)
    n_steps, n_done = (len(order) - 1).bit_length(), 0

    def of_all(done: int, total: int) -> None:
        on_progress(n_done * total + done, n_steps * total)

    while hopeless - promising > 1:
        middle = (promising + hopeless) // 2
        [own] = measure_depths(model, text_tokens, LOOK, (order[middle],), of_all)
        n_done += 1
        if is_promising(budget, own, fitted=plan.projection == FITTED):
            promising = middle
            continue
        hopeless = middle
        if is_hopeless(budget, own.induction_retention):
            deepest = order[middle] + 1
    return Bracket(deepest, order[promising], order[0])


def own_retention(model: PopModel, plan: Plan, on_progress: Progress) -> Estimate | None:
    """Measure how much of copying random tokens the plan's boundary keeps without a fit.

    That takes seconds. The figure is `Quality.induction_retention`; `on_progress` gets
    (done_tokens, total_tokens).
    """
    as_planned(model, plan)
    with forced(model) as reader:
        ran = tokens_counted(reader, LOOK, (), 1, 1, on_progress)
        repeated = read_repeated(reader, LOOK.n_draws, LOOK.seed, ran)
        pruning = Pruning(plan.boundary, LOOK.mode)
        [found] = measure_induction(reader, repeated, [pruning], ran)
    return retention(repeated, found)


def as_planned(model: PopModel, plan: Plan) -> None:
    """Let the model's full tokens be those of the plan."""
    rule = replace(model.rule, sink_tokens=plan.sink_tokens, tail_tokens=plan.tail_tokens)
    use_rule(model, rule)
