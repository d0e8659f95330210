"""The short evaluation of a depth that the user named: a fit's decides, one without a fit tells."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError
from converter.format import Measured
from converter.plan import Plan
from pop_local.measure.budget import BALANCED, FAST, copies, is_hopeless, is_inside, keeps
from pop_local.models.files import ModelFiles
from pop_local.ui.progress import token_progress
from pop_local.ui.tables import Fact
from pop_local.ui.theme import note, warn
from pop_local.ui.views.trials import figures, limits

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel
    from pop_local.measure.estimate import Estimate
    from pop_local.measure.heldout import TextTokens
    from pop_local.measure.quality import Quality, QualitySettings

# Of a fit; without one the measuring should not take long, and is not as exact.
N_WINDOWS = 8
N_OWN_WINDOWS, N_OWN_DRAWS = 4, 2


class CopyingBrokenError(PopError):
    """Context tokens skip so many layers that the model cannot copy from its prompt."""


class Examiner:
    """Measures a written file; a broken one is let through only if allowed, with a warning.

    `files`: what to open, from the source and what was written.
    """

    def __init__(
        self,
        plan: Plan,
        src: Path,
        files: Callable[[Path, Path], ModelFiles],
        *,
        n_threads: int | None,
        n_gpu_layers: int,
        allow_broken_copy: bool,
    ) -> None:
        self._plan, self._src, self._files = plan, src, files
        self._allow_broken_copy = allow_broken_copy
        self._n_threads, self._n_gpu_layers = n_threads, n_gpu_layers

    def before_fit(self) -> None:
        """Raises CopyingBrokenError where no fit would bring copying back.

        PopError where a fit could not be measured.
        """
        with self._opened(ModelFiles(self._src)) as (model, tokens):
            self._require_windows(model, tokens)
            kept = None if self._allow_broken_copy else self._own_retention(model)
        if kept is not None and is_hopeless(FAST, kept):
            raise self._refusal(
                f"{_cannot_copy(self._plan.boundary)}: {kept.value:.0%} of copying random tokens "
                "is kept with own projections, and no fit brings that back"
            )

    def _require_windows(self, model: "PopModel", tokens: "TextTokens") -> None:
        from pop_local.measure.bracket import as_planned
        from pop_local.measure.forced import forced
        from pop_local.measure.quality import QualitySettings, choose_windows

        as_planned(model, self._plan)
        try:
            with forced(model) as reader:
                choose_windows(reader, tokens, QualitySettings(N_WINDOWS))
        except PopError as error:
            raise PopError(
                f"the fit could not be measured: {error.message}",
                "lower --sink and --tail; or --projection own, which may go unmeasured",
            ) from error

    def _own_retention(self, model: "PopModel") -> "Estimate | None":
        from pop_local.measure.bracket import own_retention

        with token_progress("Trying the boundary without a fit") as advance:
            return own_retention(model, self._plan, advance)

    def __call__(self, written: Path) -> Measured:
        """Raises CopyingBrokenError, and PopError when the file cannot be measured."""
        from pop_local.measure.quality import QualitySettings

        note("Measuring what was written on held-out text")
        with self._opened(self._files(self._src, written)) as (model, tokens):
            quality = _measure(model, tokens, self._plan, QualitySettings(N_WINDOWS))
        if not (self._allow_broken_copy or copies(quality)):
            raise self._refusal(_broken(quality))
        _warn_outside(quality)
        return measured(quality)

    def _opened(self, files: ModelFiles) -> "AbstractContextManager[tuple[PopModel, TextTokens]]":
        return opened_to_measure(files, self._n_threads, self._n_gpu_layers)

    def _refusal(self, message: str) -> CopyingBrokenError:
        note(
            f"Boundary {self._plan.boundary} cannot copy; looking for the deepest that does even "
            "with own projections"
        )
        passing = self._deepest_passing(self._plan.boundary + 1)
        unfitted = f"--boundary {passing} copies even unfitted" if passing else "skip fewer layers"
        return CopyingBrokenError(
            message,
            f"{unfitted}; `--quality fast`, without --skip and --boundary, finds the deepest that "
            "copies fitted; --force writes this one all the same",
        )

    def _deepest_passing(self, first: int) -> int | None:
        """With own projections, from boundary `first` on. Fitted ones may pass deeper, but each
        would have to be fitted first."""
        from pop_local.measure.bracket import as_planned
        from pop_local.measure.reference import measure_against, measure_retention, read_reference

        with self._opened(ModelFiles(self._src)) as (model, tokens):
            as_planned(model, self._plan)
            with token_progress("Reading in full") as advance:
                reference = read_reference(model, tokens, _own_settings(), advance)
            for boundary in range(first, self._plan.shape.n_layer):
                with token_progress(f"Trying boundary {boundary}") as advance:
                    [kept] = measure_retention(reference, model, (boundary,), advance)
                    if not keeps(FAST, kept):
                        continue
                    [found] = measure_against(reference, model, (boundary,), advance)
                if copies(found):
                    return boundary
        return None


def measure_own(
    plan: Plan, src: Path, *, n_threads: int | None, n_gpu_layers: int
) -> Measured | None:
    """What own projections lose, on few windows; None and a warning where none can be measured."""
    note("Measuring what own projections lose on held-out text")
    try:
        with opened_to_measure(ModelFiles(src), n_threads, n_gpu_layers) as (model, tokens):
            quality = _measure(model, tokens, plan, _own_settings())
    except PopError as error:
        warn(f"What own projections lose is not known: {error.message}.")
        return None
    _warn_outside(quality)
    if not is_inside(BALANCED, quality):
        note("Fitted projections lose less: leave --projection own out.")
    return measured(quality)


def _measure(
    model: "PopModel", tokens: "TextTokens", plan: Plan, settings: "QualitySettings"
) -> "Quality":
    from pop_local.measure.bracket import as_planned
    from pop_local.measure.quality import measure_depths

    as_planned(model, plan)
    with token_progress("Measuring") as advance:
        [quality] = measure_depths(model, tokens, settings, (plan.boundary,), advance)
    return quality


def _own_settings() -> "QualitySettings":
    from pop_local.measure.quality import QualitySettings

    return QualitySettings(N_OWN_WINDOWS, n_draws=N_OWN_DRAWS)


def _warn_outside(quality: "Quality") -> None:
    if not copies(quality):
        warn(f"Warning: {_broken(quality)}.")
    elif not is_inside(BALANCED, quality):
        warn(
            f"Warning: boundary {quality.boundary} is outside the {BALANCED.quality} budget "
            f"({limits(BALANCED)}): {_figures(quality)}. `pop-local convert` without --skip and "
            "--boundary finds the deepest inside."
        )


def _broken(quality: "Quality") -> str:
    return f"{_cannot_copy(quality.boundary)}: {_figures(quality)}"


def _cannot_copy(boundary: int) -> str:
    return f"with boundary {boundary} the model can no longer copy from its prompt"


def _figures(quality: "Quality") -> str:
    retention = quality.induction_retention
    kept = None if retention is None else retention.value
    return figures(quality.kl_mean.value, quality.copy_ppl_ratio.value, kept)


@contextmanager
def opened_to_measure(
    files: ModelFiles, n_threads: int | None, n_gpu_layers: int
) -> "Iterator[tuple[PopModel, TextTokens]]":
    """A model, and the held-out text in its tokens."""
    from pop_local.engine.model import PopModel
    from pop_local.measure.heldout import shipped_text, tokenize
    from pop_local.measure.quality import QualitySettings

    settings = QualitySettings()
    opened = PopModel(
        files.path,
        sidecar=files.sidecar,
        n_ctx=2 * (settings.n_context + settings.n_continuation),
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
    )
    try:
        yield opened, tokenize(opened, shipped_text())
    finally:
        opened.close()


def measured(quality: "Quality") -> Measured:
    return Measured(
        kl_mean=quality.kl_mean.value,
        kl_se=quality.kl_mean.se or 0.0,
        kl_p99=quality.kl_p99.value,
        kl_first=quality.kl_first.value,
        ppl_full=quality.ppl_full.value,
        ppl_ratio=quality.ppl_ratio.value,
        top1_agreement=quality.top1_agreement.value,
        copy_ppl_ratio=quality.copy_ppl_ratio.value,
        copy_top1=quality.copy_top1.value,
        induction_delta_nll=quality.induction_delta_nll.value,
    )


def measured_facts(found: Measured) -> list[Fact]:
    """What a file says of itself, or was just found."""
    quality = (
        f"KL {found.kl_mean:.4f} ± {found.kl_se:.4f}, perplexity {found.ppl_ratio:.3f} times the "
        f"full model's, same first choice {found.top1_agreement:.1%}"
    )
    copying = (
        f"perplexity {found.copy_ppl_ratio:.3f} times the full model's, {found.copy_top1:.1%} of "
        "its tokens the first choice"
    )
    broken = found.copy_ppl_ratio > FAST.max_copy_ratio
    limit = f"BROKEN: above {FAST.max_copy_ratio:g} a model can no longer copy from its prompt"
    warning = [("", limit)] if broken else []
    return [("Quality", quality), ("Copying", copying), *warning]
