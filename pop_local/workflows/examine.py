"""The short evaluation of a depth that the caller named; of a fit it decides, else it tells."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pop_converter.popfile.format import Measured
from pop_converter.popfile.plan import Plan
from pop_converter.projection import Projection
from pop_local.base.errors import PopError
from pop_local.engine.model import PopModel
from pop_local.measure import depth
from pop_local.measure.budget import (
    BALANCED,
    FAST,
    copies,
    figures_in_words,
    is_hopeless,
    is_inside,
    keeps,
    limits_in_words,
)
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import TextTokens
from pop_local.measure.quality import (
    Quality,
    QualitySettings,
    choose_windows,
    measure_against,
    measure_prunings,
    measure_retention,
    read_reference,
)
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import measured, opened_to_measure
from pop_local.workflows.options import Hardware
from pop_local.workflows.refusals import CopyingBrokenError, broken_copy

# Of a fit; without one the measuring should not take long, and is not as exact.
N_WINDOWS = 8
N_OWN_WINDOWS, N_OWN_DRAWS = 4, 2


@dataclass(frozen=True)
class Examination:
    """What is examined: a plan of the model `src`. Broken copying is let through if allowed."""

    plan: Plan
    src: Path
    hardware: Hardware
    watch: Watch
    allow_broken_copy: bool

    def before_fit(self) -> None:
        """Raises CopyingBrokenError where no fit would bring copying back.

        One with attention may. Raises PopError where a fit could not be measured.
        """
        with self._opened(ModelFiles(self.src)) as (model, tokens):
            _require_windows(model, tokens)
            kept = None
            if not (self.allow_broken_copy or self.plan.projection == Projection.ATTENTION):
                advance = self.watch.stage("Trying the boundary without a fit")
                kept = depth.own_retention(model, self.plan, advance)
        if kept is not None and is_hopeless(FAST, kept):
            raise self._refusal(
                f"{kept.value:.0%} of copying random tokens is kept with own projections, and no "
                "fit brings that back"
            )

    def of_fit(self, files: ModelFiles) -> Measured:
        """Measure what was written. Raises CopyingBrokenError, and PopError when it cannot be."""
        self.watch.on_note("Measuring what was written on held-out text")
        quality = self._measure(files, QualitySettings(N_WINDOWS))
        if not (self.allow_broken_copy or copies(FAST, quality)):
            raise self._refusal(figures_in_words(quality))
        self._warn_outside(quality)
        return measured(quality)

    def of_own(self) -> Measured:
        """What own projections lose, on few windows. Raises PopError when it cannot be measured."""
        self.watch.on_note("Measuring what own projections lose on held-out text")
        quality = self._measure(ModelFiles(self.src), _own_settings())
        self._warn_outside(quality)
        if self.plan.shape.fits(quality.boundary) and not is_inside(BALANCED, quality):
            self.watch.on_warning(
                PopError(
                    "own projections lose more than fitted ones would",
                    "fit them",
                    cause="own-loses-more",
                )
            )
        return measured(quality)

    def _opened(self, files: ModelFiles) -> AbstractContextManager[tuple[PopModel, TextTokens]]:
        return opened_to_measure(files, self.plan, self.hardware, self.watch)

    def _measure(self, files: ModelFiles, settings: QualitySettings) -> Quality:
        with self._opened(files) as (model, tokens):
            pruning = Pruning(self.plan.boundary)
            [quality] = measure_prunings(
                model, tokens, settings, [pruning], self.watch.stage("Measuring")
            )
        return quality

    def _warn_outside(self, quality: Quality) -> None:
        boundary = quality.boundary
        if not copies(FAST, quality):
            self.watch.on_warning(PopError(broken_copy(boundary, figures_in_words(quality))))
        elif not is_inside(BALANCED, quality):
            found = figures_in_words(quality)
            budget = f"the {BALANCED.quality} budget ({limits_in_words(BALANCED)})"
            self.watch.on_warning(
                PopError(
                    f"boundary {boundary} is outside {budget}: {found}",
                    "give the budget instead of the depth: the deepest inside is looked for",
                    cause="outside-budget",
                )
            )

    def _refusal(self, found: str) -> CopyingBrokenError:
        boundary = self.plan.boundary
        self.watch.on_note(
            f"Boundary {boundary} cannot copy; looking for the deepest that does even with own "
            "projections"
        )
        return CopyingBrokenError(boundary, found, self._deepest_passing(boundary + 1))

    def _deepest_passing(self, first: int) -> int | None:
        """The deepest boundary from `first` on that copies with own projections.

        Fitted ones may pass deeper, but each would have to be fitted first.
        """
        with self._opened(ModelFiles(self.src)) as (model, tokens):
            advance = self.watch.stage("Reading in full")
            reference = read_reference(model, tokens, _own_settings(), advance)
            for boundary in range(first, self.plan.shape.n_layer):
                advance = self.watch.stage(f"Trying boundary {boundary}")
                [kept] = measure_retention(reference, model, (boundary,), advance)
                if not keeps(FAST, kept):
                    continue
                pruning = Pruning(boundary)
                [found] = measure_against(reference, model, (pruning,), advance)
                if copies(FAST, found):
                    return boundary
        return None


def _require_windows(model: PopModel, tokens: TextTokens) -> None:
    try:
        with forced(model) as reader:
            choose_windows(reader, tokens, QualitySettings(N_WINDOWS))
    except PopError as error:
        raise PopError(
            f"the fit could not be measured: {error.message}",
            "lower sink_tokens and tail_tokens, or take own projections, which may go unmeasured",
            cause="fit-not-measurable",
        ) from error


def _own_settings() -> QualitySettings:
    return QualitySettings(N_OWN_WINDOWS, n_draws=N_OWN_DRAWS)
