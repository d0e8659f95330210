"""A budget of quality on the command line, and the deepest boundary within it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from converter.errors import PopError
from converter.format import FITTED, Budget, PopMeta
from converter.plan import Plan
from converter.rewrite import Fitted
from converter.shape import ModelShape
from pop_local.commands.converting import Job, require_room, resumable, temporary_sidecar
from pop_local.commands.describing import (
    facts,
    limit,
    search_facts,
    search_plan,
    show_written,
)
from pop_local.commands.examining import measured, opened_to_measure
from pop_local.commands.fitting import FitOptions
from pop_local.commands.options import positive
from pop_local.measure.budget import (
    BALANCED,
    BUDGETS,
    FAST,
    NEAR_LOSSLESS,
    Bracket,
    deepest_inside,
    is_clearly_outside,
    is_inside,
    next_boundary,
    worth_fitting,
)
from pop_local.models.files import ModelFiles
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import print_facts, print_json
from pop_local.ui.theme import note
from pop_local.ui.views.trials import Trial, figures, limits, show_trials

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.heldout import TextTokens
    from pop_local.measure.quality import Quality

# What clearly fails shows on few windows; 24 have a standard error of a sixth of the KL or less.
N_FIRST_WINDOWS = 8
N_WINDOWS = 24


class QualityName(str, Enum):
    NEAR_LOSSLESS = NEAR_LOSSLESS.quality
    BALANCED = BALANCED.quality
    FAST = FAST.quality


QualityOption = Annotated[
    QualityName | None,
    typer.Option(
        "--quality", help=f"What may be lost, without --skip. Default: {BALANCED.quality}"
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        min=0.0,
        callback=positive,
        help="Largest KL divergence from the full model, instead of --quality.",
    ),
]
MaxCopyRatio = Annotated[
    float | None,
    typer.Option(
        "--max-copy-ratio",
        metavar="RATIO",
        min=0.0,
        callback=positive,
        help="Largest perplexity of a repeated passage, in the full model's; likewise.",
    ),
]


class OverBudgetError(PopError):
    """Not even one skipped layer is within the budget."""


def given_budget(
    quality: QualityName | None,
    max_kl: float | None,
    max_copy_ratio: float | None,
    *,
    has_depth: bool,
) -> Budget | None:
    """None where the user names the depth. What is not given is that of BALANCED."""
    if has_depth:
        if (quality, max_kl, max_copy_ratio) != (None, None, None):
            raise typer.BadParameter(
                "--skip and --boundary say how deep: leave out --quality, --max-kl and "
                "--max-copy-ratio"
            )
        return None
    if (max_kl, max_copy_ratio) == (None, None):
        return BUDGETS[quality.value] if quality else BALANCED
    if quality is not None:
        raise typer.BadParameter("give --quality, or limits of your own, not both")
    return replace(
        BALANCED,
        quality="custom",
        max_kl=BALANCED.max_kl if max_kl is None else max_kl,
        max_copy_ratio=BALANCED.max_copy_ratio if max_copy_ratio is None else max_copy_ratio,
    )


def possible_boundaries(shape: ModelShape) -> tuple[int, ...]:
    """From the shallowest on. Raises PlanError for a model of one layer."""
    from pop_local.measure.depth import boundaries

    return boundaries(shape)


def convert_within(
    budget: Budget, plans: Sequence[Plan], job: Job, *, dry_run: bool, json: bool
) -> None:
    """Choose among `plans`, from the shallowest on, and write. Raises OverBudgetError, PopError."""
    most = job.measure(plans[-1])
    if not json:
        print_facts(search_facts(plans, budget, job, most))
    if dry_run:
        if json:
            print_json(search_plan(plans, budget, job, most))
        return
    job.check_target(most)
    search = _Search(plans, budget, job)
    with resumable(job.options):
        chosen = search.run()
        trials = search.trials()
        if not json:
            show_trials(trials)
        written = None if chosen is None else search.write(chosen)
    if written is None:
        raise _over(budget, trials[0])
    plan, meta = written
    sizes = job.measure(plan)
    if not json:
        print_facts(facts(plan, job, sizes))
    show_written(plan, job, sizes, meta, trials, json=json)


class _Search:
    """One search; keeps what was fitted and measured."""

    def __init__(self, plans: Sequence[Plan], budget: Budget, job: Job) -> None:
        self._plans = {plan.boundary: plan for plan in plans}
        self._budget, self._job = budget, job
        self._fitted: dict[int, Fitted] = {}
        self._qualities: dict[int, Quality] = {}
        self._verdicts: dict[int, bool] = {}

    def run(self) -> int | None:
        """The deepest boundary within the budget, None when there is none."""
        bracket, verdicts = self._bracket(), self._verdicts
        while (boundary := next_boundary(bracket, verdicts)) is not None:
            if self._plans[boundary].projection == FITTED and boundary not in self._fitted:
                self._fit(worth_fitting(bracket, verdicts, boundary))
            quality = self._qualities[boundary] = self._measured(boundary)
            verdicts[boundary] = is_inside(self._budget, quality)
        return deepest_inside(verdicts)

    def trials(self) -> tuple[Trial, ...]:
        """From the shallowest on."""
        return tuple(
            Trial.of(self._qualities[b], self._plans[b].n_skipped, limit(self._plans[b]), passed)
            for b, passed in sorted(self._verdicts.items(), reverse=True)
        )

    def write(self, boundary: int) -> tuple[Plan, PopMeta]:
        """With the budget, and what was measured. Raises PopError."""
        tried = ", ".join(
            f"{each} {'inside' if passed else 'outside'}"
            for each, passed in sorted(self._verdicts.items(), reverse=True)
        )
        plan = replace(self._plans[boundary], budget=replace(self._budget, tried=tried))
        found = measured(self._qualities[boundary])
        return plan, self._job.write(plan, self._fitted.get(boundary), lambda written: found)

    def _bracket(self) -> Bracket:
        from pop_local.measure.bracket import find_bracket

        note("Looking how deep the layers' own projections go")
        deepest = self._plans[min(self._plans)]
        with (
            self._opened(None) as (model, tokens),
            token_progress("Trying boundaries") as advance,
        ):
            return find_bracket(model, deepest, self._budget, tokens, advance)

    def _fit(self, wanted: Sequence[int]) -> None:
        """The first of `wanted`, with others in the same pass over the text."""
        options = self._job.options.at(wanted[0])
        plans = [
            self._plans[boundary] for boundary in self._kept(options) or self._room_for(wanted)
        ]
        require_room(plans, self._job.source, options)
        boundaries = sorted(plan.boundary for plan in plans)
        note(f"Fitting the projections for boundary {', '.join(map(str, boundaries))}")
        for plan, fitted in zip(plans, replace(self._job, options=options).fit(plans), strict=True):
            self._fitted[plan.boundary] = fitted

    def _kept(self, options: FitOptions) -> tuple[int, ...]:
        """The boundaries of a fit to go on with, whatever memory is free now."""
        from pop_local.calibration.state import kept_boundaries

        found = kept_boundaries(options.state_path) if options.state_path else ()
        return found if set(found) <= set(self._plans) else ()

    def _room_for(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """The first of `wanted`, and as many of the others as fit into memory beside it."""
        from pop_local.calibration.needs import plan_needs

        source, memory_bytes = self._job.source, self._job.options.memory_bytes
        chosen: list[int] = []
        for boundary in wanted:
            if self._plans[boundary].projection != FITTED or boundary in self._fitted:
                continue
            plans = [self._plans[each] for each in (*chosen, boundary)]
            if chosen and len(plan_needs(plans, source, memory_bytes).groups) > 1:
                break
            chosen.append(boundary)
        return tuple(chosen)

    def _opened(
        self, sidecar: Path | None
    ) -> "AbstractContextManager[tuple[PopModel, TextTokens]]":
        files = ModelFiles(self._job.path, sidecar)
        return opened_to_measure(files, self._job.n_threads, self._job.n_gpu_layers)

    def _measured(self, boundary: int) -> "Quality":
        from pop_local.measure.bracket import as_planned
        from pop_local.measure.heldout import room
        from pop_local.measure.quality import QualitySettings, measure_unless

        note(f"Measuring boundary {boundary} on held-out text")
        plan = self._plans[boundary]
        with ExitStack() as stack:
            sidecar = None
            if plan.projection == FITTED:
                written = temporary_sidecar(plan, self._job.source, self._fitted[boundary])
                sidecar = stack.enter_context(written)
            model, tokens = stack.enter_context(self._opened(sidecar))
            as_planned(model, plan)
            advance = stack.enter_context(token_progress(f"Measuring boundary {boundary}"))
            settings = QualitySettings()
            n_found = room(tokens, settings.n_context + settings.n_continuation)
            return measure_unless(
                model,
                tokens,
                replace(settings, n_windows=min(N_WINDOWS, max(1, n_found))),
                boundary,
                N_FIRST_WINDOWS,
                lambda quality: is_clearly_outside(self._budget, quality),
                advance,
            )


def _over(budget: Budget, best: Trial) -> OverBudgetError:
    measured_as = figures(best.kl_mean, best.copy_ppl_ratio, best.induction_retention)
    return OverBudgetError(
        f"not even {best.n_skipped} skipped layer{'s' * (best.n_skipped > 1)} is within the budget "
        f"({limits(budget)}): {measured_as}",
        "allow more (--quality fast, --max-kl, --max-copy-ratio), or choose --skip yourself",
    )
