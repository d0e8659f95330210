"""The fastest recipe with which facts of a prompt are found again: boundary and share together.

Past the boundary where a pruned model can copy, rows that the question needs run all layers. The
boundary and their share go together, and not monotonically (docs/depth.md). So recipes are tried
from the fastest on, and the first one that is as good as the full model is taken.
"""

from collections.abc import Sequence
from dataclasses import replace

from pop_converter.popfile.format import Budget, Refilled
from pop_converter.popfile.plan import Plan
from pop_converter.projection import Projection
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.quality import Quality, QualitySettings, measure_prunings
from pop_local.measure.recall import N_AROUND, Recall, RecallReference, RecallSettings
from pop_local.workflows.conversion.plan import ConversionRun, Outcome
from pop_local.workflows.conversion.refusals import RecallLostError
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import measured, recalled

# How much less often a fact may be found than by the full model.
MAX_LOST_RECALL = 0.05
_SETTINGS = RecallSettings()
_N_WINDOWS = 16
# Refilled token by token, a window takes as long as several read at once.
_N_REFILLED_WINDOWS = 4
N_REFILLED = 8


def write_first(run: ConversionRun, *, takes_any: bool) -> Outcome:
    """Write the first plan of a conversion that finds facts like the full model.

    Each plan has its selection. `takes_any`: the first one, whatever it finds. Raises
    RecallLostError when none is good enough, PopError, StoppedError.
    """
    bench, plans = run.bench, run.conversion.plans
    with run.resumable():
        bases = {plan.boundary: replace(plan, select=0.0) for plan in plans}
        wanted = [plan for plan in bases.values() if plan.projection != Projection.OWN]
        bench.require_room(wanted, run.fit.kv_type)
        made = run.fitter().fit(wanted, run.fit.state_path)
        fitted = {plan.boundary: fit for plan, fit in zip(wanted, made, strict=True)}
        n_ctx = max(_SETTINGS.n_tokens + N_AROUND, 2 * QualitySettings().n_context)
        with bench.opened(plans[0], n_ctx=n_ctx) as model:
            advance = bench.watch.stage("Asking for facts in full")
            reference = RecallReference.read(model, _SETTINGS, advance)
        tried: list[str] = []
        for plan in plans:
            fit = fitted.get(plan.boundary)
            plan = replace(plan, projection=fit.projection if fit else Projection.OWN)
            with bench.tried(plan, fit, n_ctx=n_ctx) as model:
                name = f"boundary {plan.boundary}, {plan.select:.0%} selected"
                advance = bench.watch.stage(f"Trying {name}")
                recall = reference.measure(model, _pruning(plan), advance)
                tried.append(f"{name}: {recall.exact_pruned.value:.0%}")
                if not (takes_any or _is_as_good(recall)):
                    continue
                decided, quality = _decided(model, plan, recall, tried, bench.watch)
            return run.write_measured(decided, fit, measured(quality))
    raise RecallLostError(recall, tried)


def _is_as_good(recall: Recall) -> bool:
    """Tell whether facts are found about as often as by the full model."""
    return recall.exact_pruned.value >= recall.exact_full.value - MAX_LOST_RECALL


def _pruning(plan: Plan) -> Pruning:
    return Pruning(plan.boundary, select=plan.select)


def _decided(
    model: PopModel, plan: Plan, recall: Recall, tried: Sequence[str], watch: Watch
) -> tuple[Plan, Quality]:
    """Measure the plan that is taken; return it with what decided, and its quality."""

    def of(pruning: Pruning, settings: QualitySettings, stage: str) -> Quality:
        text = tokenize(model, shipped_text())
        [quality] = measure_prunings(model, text, settings, [pruning], watch.stage(stage))
        return quality

    quality = of(_pruning(plan), QualitySettings(_N_WINDOWS), "Measuring")
    refilling = replace(_pruning(plan), n_refilled=N_REFILLED)
    # A file stores nothing about random tokens.
    few = QualitySettings(_N_REFILLED_WINDOWS, n_draws=1)
    later = of(refilling, few, "Measuring with refilling")
    refilled = Refilled(
        N_REFILLED,
        later.kl_mean.value,
        later.kl_mean.se or 0.0,
        later.ppl_ratio.value,
        later.copy_ppl_ratio.value,
    )
    watch.on_note(
        f"Chosen: {tried[-1]} of the facts found, {recall.exact_full.value:.0%} in full;"
        f" at most {plan.speedup_limit:.2f} times as fast. Before it is refilled, text is copied"
        f" with {quality.copy_ppl_ratio.value:.2f} times the perplexity, with {N_REFILLED} tokens"
        f" refilled before each of the answer {refilled.copy_ppl_ratio:.2f} times."
    )
    budget = Budget(
        "fastest",
        max_kl=quality.kl_mean.value,
        max_ppl_ratio=quality.ppl_ratio.value,
        max_copy_ratio=quality.copy_ppl_ratio.value,
        least_retention=0.0,
        max_lost_recall=MAX_LOST_RECALL,
        tried="; ".join(tried),
    )
    return replace(plan, budget=budget, refilled=refilled, recall=recalled(recall)), quality
