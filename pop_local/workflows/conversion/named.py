"""A boundary that the caller named: fitted, measured in short and written, or refused."""

from dataclasses import dataclass, replace

from pop_converter.base.errors import PopError
from pop_converter.base.progress import Progress, counting
from pop_converter.popfile.format import Measured
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.projection import Projection
from pop_local.engine.model import PopModel
from pop_local.measure.budget import (
    BALANCED,
    copies,
    figures_in_words,
    is_hopeless,
    is_inside,
    keeps,
    keeps_lookups,
    limits_in_words,
)
from pop_local.measure.estimate import Estimate
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import Lookups, LookupSettings, measure_lookups
from pop_local.measure.probes import measure_induction, read_repeated
from pop_local.measure.quality import (
    Quality,
    QualitySettings,
    choose_windows,
    measure_against,
    measure_prunings,
    measure_retention,
    read_reference,
    retention,
)
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.conversion.plan import ConversionRun, Outcome
from pop_local.workflows.conversion.refusals import CopyingBrokenError, broken_copy
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.measuring import measured

# Windows and look-up documents for a fit. Looking for another boundary is shorter and less exact.
N_WINDOWS = 8
N_DOCUMENTS = 5
N_OWN_WINDOWS, N_OWN_DRAWS = 4, 2


def write_named(run: ConversionRun) -> Outcome:
    """Write the boundary of a conversion. Raises CopyingBrokenError, PopError, StoppedError.

    A fit that cannot copy is refused unless that is forced; own projections are not measured.
    """
    [plan], output = run.conversion.plans, run.conversion.output
    if plan.projection == Projection.OWN:
        run.bench.watch.on_note(
            "What own projections lose was not asked for, and is not measured:"
            " a quality beside the boundary measures it"
        )
        return run.write(plan, None, None)
    examination = Examination(run.bench, plan, allow_broken_copy=run.force)
    examination.before_fit()
    with run.resumable():
        fitter = run.fitter()
        [fitted] = fitter.fit((plan,), run.fit.state_path)
        if fitter.distiller is not None:
            fitted = fitter.distilled(replace(plan, projection=fitted.projection), fitted)
        return run.write(
            plan,
            fitted,
            lambda written: examination.of_fit(output.files(run.bench.path, written)),
        )


@dataclass(frozen=True)
class Examination:
    """A plan that is examined. Broken copying is let through if allowed."""

    bench: TrialRunner
    plan: Plan
    allow_broken_copy: bool

    def before_fit(self) -> None:
        """Raises CopyingBrokenError where no fit would bring copying back.

        Raises PopError where a fit could not be measured.
        """
        with self.bench.opened(self.plan) as model:
            _require_windows(model)
            kept = None
            if not self.allow_broken_copy:
                advance = self.bench.watch.stage("Trying the boundary without a fit")
                kept = own_retention(model, self.plan.boundary, advance)
        if kept is not None and is_hopeless(kept):
            raise self._refusal(
                f"{kept.value:.0%} of copying random tokens is kept with own projections, and no "
                "fit brings that back"
            )

    def of_fit(self, files: ModelFiles) -> Measured:
        """Measure what was written. Raises CopyingBrokenError, and PopError when it cannot be."""
        self.bench.watch.on_note("Measuring what was written on held-out text")
        with self.bench.opened(self.plan, files) as model:
            tokens, pruning = tokenize(model, shipped_text()), Pruning(self.plan.boundary)
            advance = self.bench.watch.stage("Measuring")
            settings = QualitySettings(N_WINDOWS)
            [quality] = measure_prunings(model, tokens, settings, [pruning], advance)
            advance = self.bench.watch.stage("Asking for look-ups")
            asked = LookupSettings(N_DOCUMENTS)
            [lookups] = measure_lookups(model, asked, [pruning], advance)
        if not (self.allow_broken_copy or copies(quality)):
            raise self._refusal(figures_in_words(quality))
        self._warn_outside(quality, lookups)
        return measured(quality, lookups)

    def _warn_outside(self, quality: Quality, lookups: Lookups) -> None:
        boundary = quality.boundary
        if not copies(quality):
            self.bench.watch.on_warning(PopError(broken_copy(boundary, figures_in_words(quality))))
        elif not (is_inside(BALANCED, quality) and keeps_lookups(BALANCED, lookups)):
            found = figures_in_words(quality, lookups)
            budget = f"the {BALANCED.quality} budget ({limits_in_words(BALANCED)})"
            self.bench.watch.on_warning(
                PopError(
                    f"boundary {boundary} is outside {budget}: {found}",
                    "give the budget instead of the boundary: the deepest inside is looked for",
                    cause="outside-budget",
                )
            )

    def _refusal(self, found: str) -> CopyingBrokenError:
        boundary = self.plan.boundary
        self.bench.watch.on_note(
            f"Boundary {boundary} cannot copy; looking for the deepest that does even with own "
            "projections"
        )
        return CopyingBrokenError(boundary, found, self._deepest_passing(boundary + 1))

    def _deepest_passing(self, first: int) -> int | None:
        """Return the deepest boundary from `first` on that copies with own projections.

        Fitted ones may pass deeper, but each would have to be fitted first.
        """
        with self.bench.opened(self.plan) as model:
            advance = self.bench.watch.stage("Reading in full")
            tokens = tokenize(model, shipped_text())
            reference = read_reference(model, tokens, _own_settings(), advance)
            for boundary in range(first, self.plan.shape.n_layer):
                advance = self.bench.watch.stage(f"Trying boundary {boundary}")
                [kept] = measure_retention(reference, model, (boundary,), advance)
                if not keeps(kept):
                    continue
                [found] = measure_against(reference, model, (Pruning(boundary),), advance)
                if copies(found):
                    return boundary
        return None


def own_retention(model: PopModel, boundary: int, on_progress: Progress) -> Estimate | None:
    """Measure `Quality.induction_retention` without a fit, in seconds.

    `on_progress` counts draws.
    """
    settings = _own_settings()
    with forced(model) as reader:
        ran = counting(2 * settings.n_draws, on_progress)
        repeated = read_repeated(reader, settings.n_draws, settings.seed, ran)
        [found] = measure_induction(reader, repeated, [Pruning(boundary)], ran)
    return retention(repeated, found)


def _own_settings() -> QualitySettings:
    return QualitySettings(N_OWN_WINDOWS, n_draws=N_OWN_DRAWS)


def _require_windows(model: PopModel) -> None:
    try:
        with forced(model) as reader:
            choose_windows(reader, tokenize(model, shipped_text()), QualitySettings(N_WINDOWS))
    except PopError as error:
        raise PopError(
            f"the fit could not be measured: {error.message}",
            "lower sink_tokens and tail_tokens, or take own projections, which may go unmeasured",
            cause="fit-not-measurable",
        ) from error
