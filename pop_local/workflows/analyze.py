"""Which layers reading can do without: importance by gates, then what each boundary costs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import PopError
from converter.format import FITTED, Budget, Calibration
from converter.macs import LIMIT_PROMPT
from converter.plan import Plan, make_plan
from converter.shape import ModelShape, source_shape
from converter.sidecar import pop_of
from converter.source import Source, read_source
from pop_local.calibration import needs as memory
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import default_tokens
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule
from pop_local.measure import budget
from pop_local.measure.bracket import as_planned
from pop_local.measure.depth import (
    Depth,
    deepest_within,
    measure_cliff,
    with_qualities,
    worth_measuring,
)
from pop_local.measure.heldout import Text, given_text, shipped_part, spread_windows, tokenize
from pop_local.measure.probes import N_REPEATED, bos, require_passage
from pop_local.measure.quality import Quality, QualitySettings
from pop_local.measure.reference import Reference, measure_against, read_reference
from pop_local.models.names import resolve_base
from pop_local.models.stored import ModelFiles
from pop_local.workflows import gates
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened
from pop_local.workflows.options import Hardware
from pop_local.workflows.refusals import TooLittleMemoryError
from pop_local.workflows.sidecars import fitted_sidecars

if TYPE_CHECKING:
    from pop_local.measure.importance import Importance

# Of random tokens: these give the retention to some percent.
_N_DRAWS = 2
# Of the tokens that `convert` fits on: enough to compare depths.
_FIT_SHARE = 4


@dataclass(frozen=True)
class AnalyzeOptions:
    """What is analyzed. `text`: a file, None for the shipped prose.

    Windows have `n_context` + `n_answer` tokens: `n_probed` of them for the probes, `n_gated` for
    the gates, 0 for no gates. `with_fit`: measure fitted projections; `fit_tokens` None for a
    quarter of what a conversion fits on.
    """

    text: Path | None = None
    n_context: int = 192
    n_answer: int = 64
    n_probed: int = 3
    n_gated: int = 20
    with_fit: bool = True
    fit_tokens: int | None = None
    seed: int = 0

    @property
    def n_window(self) -> int:
        return self.n_context + self.n_answer


@dataclass(frozen=True)
class Analysis:
    """`importance` is None where the gates were left out; `depths` from the deepest layer on.

    `calibration`: of the fits, None where there are none. `chosen`: the deepest boundary that
    `budget` accepts on these figures.
    """

    model: Path
    text: Text
    seed: int
    importance: Importance | None
    depths: tuple[Depth, ...]
    calibration: Calibration | None
    budget: Budget
    chosen: Depth | None

    @property
    def cliff(self) -> tuple[Depth, ...]:
        """The boundaries at which copying from the prompt is lost."""
        return tuple(depth for depth in self.depths if depth.is_cliff)


def analyze(
    model: str | os.PathLike[str],
    options: AnalyzeOptions = AnalyzeOptions(),
    *,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Analysis:
    """Measure which layers matter for reading and for answering, and how deep pruning may go.

    The model is given by path or name, and has no fitted projections. What cannot be had (gates
    without torch, a fit of a converted file) is left out with a warning. Raises PopError,
    StoppedError.
    """
    source = read_source(resolve_base(os.fspath(model)))
    require_own_projections(source)
    text = _text(options)
    run = _Run(source, source_shape(source), text, options, hardware, watch)
    run.require_long_enough()
    can_fit = options.with_fit and run.fit_is_possible()
    gated = gates.possible(source, options, hardware, watch) if options.n_gated else None
    found = run.probed(options.n_gated if gated else 0)
    fits = run.fitted(found) if can_fit else Fits()
    depths = with_qualities(found.depths, run.unfitted(found, fits), fits.qualities)
    importance = None
    if gated is not None:
        importance = gates.importance(source, gated, found.windows, options, hardware, watch)
    return Analysis(
        model=source.first.path,
        text=text,
        seed=options.seed,
        importance=importance,
        depths=depths,
        calibration=fits.calibration,
        budget=budget.BALANCED,
        chosen=deepest_within(budget.BALANCED, depths),
    )


def require_own_projections(source: Source) -> None:
    """Raises PopError for a file whose projections are fitted to one boundary."""
    meta = pop_of(source, None)
    if meta is not None and meta.projection == FITTED:
        path = source.first.path
        raise PopError(
            f"{path} has projections that fit its boundary {meta.boundary} only",
            "analyze the model that it was made of; stripping the file gives it back",
            cause="analyze-fitted",
            path=path,
        )


def _text(options: AnalyzeOptions) -> Text:
    if options.text is None:
        return Text("prose of pop-local", (shipped_part("prose"),))
    return given_text(options.text)


@dataclass(frozen=True)
class Probed:
    """How much of copying each boundary keeps, the full model's half, the windows for the gates."""

    depths: tuple[Depth, ...]
    reference: Reference
    windows: gates.Windows

    @property
    def worth_measuring(self) -> tuple[int, ...]:
        return worth_measuring(self.depths)


@dataclass(frozen=True)
class Fits:
    """What the boundaries cost with a fit; `calibration` None where there is none."""

    qualities: Mapping[int, Quality] = field(default_factory=dict)
    calibration: Calibration | None = None


@dataclass(frozen=True)
class _Run:
    """One analysis under way."""

    source: Source
    shape: ModelShape
    text: Text
    options: AnalyzeOptions
    hardware: Hardware
    watch: Watch

    def require_long_enough(self) -> None:
        """Raises PopError for a context of which a conversion would prune too little to measure."""
        plan = self._plan(self.shape.n_layer - 1)
        require_passage(self.options.n_context, RowRule(plan.sink_tokens, plan.tail_tokens))

    def fit_is_possible(self) -> bool:
        """False for a converted file, with a warning.

        Raises PopError when memory does not do for the projections of even one layer.
        """
        if pop_of(self.source, None) is not None:
            path = self.source.first.path
            self.watch.on_warning(PopError(f"the fit is left out: {path} is converted already"))
            return False
        if self.shape.n_layer > 2:
            self._affordable([self._plan(self.shape.n_layer - 2)])
        return True

    def probed(self, n_gated: int) -> Probed:
        """Read the full model's half, then random tokens at each boundary. Raises PopError."""
        options = self.options
        settings = QualitySettings(
            options.n_probed,
            options.n_context,
            options.n_answer,
            seed=options.seed,
            n_draws=_N_DRAWS,
        )
        with self._opened_as_planned() as model:
            tokens = tokenize(model, self.text)
            start = bos(model)
            texts = spread_windows(tokens, n_gated, options.n_window - len(start))
            advance = self.watch.stage("Reading in full")
            reference = read_reference(model, tokens, settings, advance)
            advance = self.watch.stage("Looking for the cliff")
            depths = measure_cliff(model, self.shape, reference, LIMIT_PROMPT, advance)
        return Probed(depths, reference, [[*start, *text] for text in texts])

    def fitted(self, found: Probed) -> Fits:
        """Fit the boundaries that are worth it in one pass, and measure each. Raises PopError."""
        # The last layer alone has nothing to fit.
        plans = [self._plan(b) for b in found.worth_measuring if b < self.shape.n_layer - 1]
        if not plans:
            return Fits()
        plans = self._affordable(plans)
        sidecars = fitted_sidecars(
            plans, self.source, self._fit_options(), self.hardware, self.watch
        )
        qualities: dict[int, Quality] = {}
        calibration: Calibration | None = None
        with closing(sidecars):
            for number, (plan, sidecar) in enumerate(zip(plans, sidecars, strict=True), 1):
                meta = pop_of(self.source, sidecar)
                calibration = None if meta is None else meta.calibration
                advance = self.watch.stage(f"Measuring fits, {number} of {len(plans)}")
                with self._opened(sidecar) as model:
                    at = (plan.boundary,)
                    [qualities[plan.boundary]] = measure_against(
                        found.reference, model, at, advance
                    )
        return Fits(qualities, calibration)

    def unfitted(self, found: Probed, fits: Fits) -> dict[int, Quality]:
        """Measure the boundaries that are worth it and have no fit."""
        wanted = [b for b in found.worth_measuring if b not in fits.qualities]
        if not wanted:
            return {}
        with self._opened_as_planned() as model:
            advance = self.watch.stage("Measuring with own projections")
            qualities = measure_against(found.reference, model, wanted, advance)
        return {quality.boundary: quality for quality in qualities}

    def _plan(self, boundary: int) -> Plan:
        return make_plan(self.shape, boundary=boundary, projection=FITTED)

    def _fit_options(self) -> FitOptions:
        given = self.options.fit_tokens
        return FitOptions(given or default_tokens(self.shape.n_embd) // _FIT_SHARE)

    def _affordable(self, plans: list[Plan]) -> list[Plan]:
        """As many of the first as one pass over the text has memory for, at least one."""
        free_bytes = memory.free_bytes()
        for n in range(len(plans), 0, -1):
            needs = memory.fit_needs(plans[:n], self.source, self._fit_options())
            if needs.total_bytes <= free_bytes and (n == 1 or len(needs.groups) == 1):
                if n < len(plans):
                    self.watch.on_note(
                        f"There is memory to fit {n} of {len(plans)} boundaries in one pass; the"
                        " others are measured with own projections"
                    )
                return plans[:n]
        raise TooLittleMemoryError(
            "the fit needs",
            needs.total_bytes,
            free_bytes,
            "fit on fewer tokens, close other programs, or leave it out",
            cause="no-memory-for-fit",
        )

    @contextmanager
    def _opened_as_planned(self) -> Iterator[PopModel]:
        """With own projections, and the full rows that a conversion has, whatever the file says."""
        with self._opened(None) as model:
            as_planned(model, self._plan(self.shape.n_layer - 1))
            yield model

    def _opened(self, sidecar: Path | None) -> PopModel:
        files = ModelFiles(self.source.first.path, sidecar)
        n_ctx = max(self.options.n_window, 2 * N_REPEATED + 1)
        return opened(files, self.hardware, self.watch, n_ctx=n_ctx)
