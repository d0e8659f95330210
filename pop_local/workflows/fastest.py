"""The fastest recipe with which facts of a prompt are found again: boundary and share together.

Past the depth where a pruned model can copy, rows that the question needs run all layers. How deep
and how many go together, and not monotonically (docs/depth.md): so recipes are tried from the
fastest on, and the first one that is as good as the full model is taken.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from pop_converter.architecture.shape import ModelShape
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Budget, Refilled
from pop_converter.popfile.plan import Plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.projection import Projection
from pop_local.calibration.options import FitOptions
from pop_local.engine.model import PopModel
from pop_local.engine.turn import TurnOptions
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.quality import Quality, QualitySettings, measure_prunings
from pop_local.measure.recall import N_AROUND, Recall, RecallReference, RecallSettings
from pop_local.measure.speed import random_prompt
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.fits import Fitter, require_room, temporary_sidecar
from pop_local.workflows.measuring import opened, recalled
from pop_local.workflows.options import Boundary, Hardware
from pop_local.workflows.refusals import RecallLostError

FASTEST = "fastest"
# Of the layers, what is kept below the boundary; of the context tokens, what is selected.
_KEPT_SHARES = (1 / 3, 5 / 12, 1 / 2, 7 / 12)
_SHARES = (0.1, 0.2)
# How much less often a fact may be found than by the full model.
MAX_LOST_RECALL = 0.05
_SETTINGS = RecallSettings()
_N_WINDOWS = 16
# Refilled token by token, a window takes as long as several read at once.
_N_REFILLED_WINDOWS = 4
N_REFILLED = 8
_N_TIMED = 24


@dataclass(frozen=True)
class Recipe:
    """A plan with its selection, the facts it finds again, and its fit."""

    plan: Plan
    fitted: Fitted | None
    recall: Recall
    quality: Quality


def recipes(shape: ModelShape, **rows: Any) -> tuple[Plan, ...]:
    """Return the plans that may be chosen, the fastest first; `rows` go to make_plan."""
    layers = {max(1, round(share * shape.n_layer)) for share in _KEPT_SHARES}
    plans = [
        Boundary(layer).plan(shape, **rows | {"select": share})
        for layer in layers
        for share in _SHARES
    ]
    return tuple(sorted(plans, key=lambda plan: -plan.speedup_limit))


def first_that_recalls(
    source: Source,
    plans: Sequence[Plan],
    options: FitOptions,
    hardware: Hardware,
    watch: Watch,
    kinds: Sequence[Projection],
    *,
    takes_any: bool = False,
) -> Recipe:
    """Take the first of the plans, each with its selection, that finds facts like the full model.

    Those to be fitted are, by `options`, which may leave open which of `kinds`. `takes_any`: the
    first one, whatever it finds. Raises RecallLostError when none is good enough, PopError,
    StoppedError.
    """
    bases = {plan.boundary: replace(plan, select=0.0) for plan in plans}
    wanted = [plan for plan in bases.values() if plan.projection != Projection.OWN]
    require_room(wanted, source, options)
    made = Fitter(source, options, hardware, watch, kinds).fit(wanted, options.state_path)
    fitted = {plan.boundary: fit for plan, fit in zip(wanted, made, strict=True)}
    n_ctx = max(_SETTINGS.n_tokens + N_AROUND, 2 * QualitySettings().n_context)
    with opened(ModelFiles(source.first.path), hardware, watch, n_ctx=n_ctx) as model:
        advance = watch.stage("Asking for facts in full")
        reference = RecallReference.read(model, _SETTINGS, advance)
    tried: list[str] = []
    for plan in plans:
        fit = fitted.get(plan.boundary)
        plan = replace(plan, projection=fit.projection if fit else Projection.OWN)
        with (
            temporary_sidecar(plan, source, fit) as sidecar,
            opened(ModelFiles(source.first.path, sidecar), hardware, watch, n_ctx=n_ctx) as model,
        ):
            pruning = Pruning(plan.boundary, select=plan.select)
            name = f"boundary {plan.boundary}, {plan.select:.0%} selected"
            recall = reference.measure(model, pruning, watch.stage(f"Trying {name}"))
            tried.append(f"{name}: {recall.exact_pruned.value:.0%}")
            if takes_any or is_as_good(recall):
                return _chosen(model, plan, fit, recall, tried, watch)
    raise RecallLostError(recall, tried)


def is_as_good(recall: Recall) -> bool:
    """Tell whether facts are found about as often as by the full model."""
    return recall.exact_pruned.value >= recall.exact_full.value - MAX_LOST_RECALL


def _chosen(
    model: PopModel,
    plan: Plan,
    fitted: Fitted | None,
    recall: Recall,
    tried: Sequence[str],
    watch: Watch,
) -> Recipe:
    pruning = Pruning(plan.boundary, select=plan.select)

    def measured(pruning: Pruning, settings: QualitySettings, stage: str) -> Quality:
        text = tokenize(model, shipped_text())
        [quality] = measure_prunings(model, text, settings, [pruning], watch.stage(stage))
        return quality

    quality = measured(pruning, QualitySettings(_N_WINDOWS), "Measuring")
    refilling = replace(pruning, n_refilled=N_REFILLED)
    # Of random tokens nothing is stored.
    few = QualitySettings(_N_REFILLED_WINDOWS, n_draws=1)
    later = measured(refilling, few, "Measuring with refilling")
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
    watch.on_note(_affordable(model))
    budget = Budget(
        FASTEST,
        max_kl=quality.kl_mean.value,
        max_ppl_ratio=quality.ppl_ratio.value,
        max_copy_ratio=quality.copy_ppl_ratio.value,
        least_retention=0.0,
        max_lost_recall=MAX_LOST_RECALL,
        tried="; ".join(tried),
    )
    decided = replace(plan, budget=budget, refilled=refilled, recall=recalled(recall))
    return Recipe(decided, fitted, recall, quality)


def _affordable(model: PopModel) -> str:
    """Say how many rows this machine can refill with each token of an answer."""
    model.set_depth(model.rule.select, keep_states=True)
    model.refiller.refill_answers(None)
    model.read(random_prompt(model, _SETTINGS.n_tokens))
    with closing(model.sampled(TurnOptions(temperature=0.0))) as sampled:
        for _ in range(_N_TIMED):
            next(sampled)
    n_rows = model.refiller.online.n_rows or 0
    model.refiller.refill_answers(0)
    if n_rows == 0:
        return "This machine computes at its limit: nothing is refilled while it answers."
    return f"This machine can refill {n_rows} rows with each token of an answer."
