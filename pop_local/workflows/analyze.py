"""Which layers reading can do without: importance by gates, then what each boundary costs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.popfile.plan import Plan, make_plan
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.base.errors import PopError
from pop_local.calibration import needs as memory
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import default_tokens
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import RowRule
from pop_local.measure import budget
from pop_local.measure.depth import (
    DepthCost,
    deepest_within,
    measure_cliff,
    with_qualities,
    worth_measuring,
)
from pop_local.measure.forced import Pruning, as_planned
from pop_local.measure.heldout import Text, given_text, shipped_part, spread_windows, tokenize
from pop_local.measure.probes import N_REPEATED, bos, require_passage
from pop_local.measure.quality import (
    Quality,
    QualitySettings,
    Reference,
    measure_against,
    read_reference,
)
from pop_local.models.names import resolve_base
from pop_local.models.stored import ModelFiles
from pop_local.workflows import gates
from pop_local.workflows.conversion.fits import measure_fits
from pop_local.workflows.conversion.refusals import TooLittleMemoryError
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened
from pop_local.workflows.options import AnalyzeOptions, Hardware

if TYPE_CHECKING:
    from pop_local.measure.importance import Importance

# Of random tokens: these give the retention to some percent.
_N_DRAWS = 2
# Of the tokens that `convert` fits on: enough to compare depths.
_FIT_SHARE = 4


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
    depths: tuple[DepthCost, ...]
    calibration: Calibration | None
    budget: Budget
    chosen: DepthCost | None

    @property
    def cliff(self) -> tuple[DepthCost, ...]:
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
    text = (
        given_text(options.text)
        if options.text
        else Text("prose of pop-local", (shipped_part("prose"),))
    )
    run = _Run(source, source_shape(source), text, options, hardware, watch)
    # A conversion would prune all but these.
    ends = run.plan(run.shape.n_layer - 1)
    require_passage(options.n_context, RowRule(ends.sink_tokens, ends.tail_tokens))
    can_fit = options.with_fit and run.fit_is_possible()
    gated = gates.possible(source, options, hardware, watch) if options.n_gated else None
    depths, reference, windows = run.probed(options.n_gated if gated else 0)
    wanted = worth_measuring(depths)
    fitted, calibration = run.fitted(reference, wanted) if can_fit else ({}, None)
    own = run.unfitted(reference, [boundary for boundary in wanted if boundary not in fitted])
    depths = with_qualities(depths, own, fitted)
    importance = None
    if gated is not None:
        importance = gates.importance(source, gated, windows, options, watch)
    return Analysis(
        model=source.first.path,
        text=text,
        seed=options.seed,
        importance=importance,
        depths=depths,
        calibration=calibration,
        budget=budget.BALANCED,
        chosen=deepest_within(budget.BALANCED, depths),
    )


def require_own_projections(source: Source) -> None:
    """Raises PopError for a file whose projections are fitted to one boundary."""
    meta = pop_of(source, None)
    if meta is not None and meta.is_fitted:
        path = source.first.path
        raise PopError(
            f"{path} has projections that fit its boundary {meta.boundary} only",
            "analyze the model that it was made of; stripping the file gives it back",
            cause="analyze-fitted",
            path=path,
        )


@dataclass(frozen=True)
class _Run:
    """One analysis under way."""

    source: Source
    shape: ModelShape
    text: Text
    options: AnalyzeOptions
    hardware: Hardware
    watch: Watch

    def fit_is_possible(self) -> bool:
        """False for a converted file, with a warning.

        Raises PopError when memory does not do for the projections of even one layer.
        """
        if pop_of(self.source, None) is not None:
            path = self.source.first.path
            self.watch.on_warning(PopError(f"the fit is left out: {path} is converted already"))
            return False
        if self.shape.n_layer > 2:
            self._affordable([self.plan(self.shape.n_layer - 2)])
        return True

    def probed(self, n_gated: int) -> tuple[tuple[DepthCost, ...], Reference, gates.Windows]:
        """Read the full model's half, then random tokens at each boundary. Raises PopError.

        Returns how much of copying each boundary keeps, that half, and `n_gated` windows.
        """
        options = self.options
        n_probed, n_context, n_answer = options.n_probed, options.n_context, options.n_answer
        settings = QualitySettings(
            n_probed, n_context, n_answer, seed=options.seed, n_draws=_N_DRAWS
        )
        with self._opened_as_planned() as model:
            tokens = tokenize(model, self.text)
            start = bos(model)
            texts = spread_windows(tokens, n_gated, options.n_window - len(start))
            advance = self.watch.stage("Reading in full")
            reference = read_reference(model, tokens, settings, advance)
            advance = self.watch.stage("Looking for the cliff")
            depths = measure_cliff(model, reference, advance)
        return depths, reference, [[*start, *text] for text in texts]

    def fitted(
        self, reference: Reference, boundaries: Sequence[int]
    ) -> tuple[dict[int, Quality], Calibration | None]:
        """Fit in one pass those that can be, and measure each. Raises PopError."""
        # The last layer alone has nothing to fit.
        plans = [self.plan(b) for b in boundaries if b < self.shape.n_layer - 1]
        plans = self._affordable(plans) if plans else []
        calibrations: list[Calibration | None] = []

        def measure(plan: Plan, sidecar: Path) -> Quality:
            meta = pop_of(self.source, sidecar)
            calibrations.append(None if meta is None else meta.calibration)
            advance = self.watch.stage(f"Measuring fits, {len(calibrations)} of {len(plans)}")
            with self._opened(sidecar) as model:
                [found] = measure_against(reference, model, (Pruning(plan.boundary),), advance)
            return found

        fit = self._fit_options()
        found = measure_fits(plans, self.source, fit, self.hardware, self.watch, measure)
        return {each.boundary: each for each in found}, (calibrations or [None])[0]

    def unfitted(self, reference: Reference, boundaries: Sequence[int]) -> dict[int, Quality]:
        """Measure with the layers' own projections."""
        if not boundaries:
            return {}
        with self._opened_as_planned() as model:
            advance = self.watch.stage("Measuring with own projections")
            found = measure_against(reference, model, [*map(Pruning, boundaries)], advance)
        return {quality.boundary: quality for quality in found}

    def plan(self, boundary: int) -> Plan:
        return make_plan(self.shape, boundary=boundary, projection=Projection.FITTED)

    def _fit_options(self) -> FitOptions:
        n_tokens = self.options.fit_tokens or default_tokens(self.shape.n_embd) // _FIT_SHARE
        return FitOptions(n_tokens, projection=Projection.FITTED)

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
            as_planned(model, self.plan(self.shape.n_layer - 1))
            yield model

    def _opened(self, sidecar: Path | None) -> PopModel:
        files = ModelFiles(self.source.first.path, sidecar)
        n_ctx = max(self.options.n_window, 2 * N_REPEATED + 1)
        return opened(files, self.hardware, self.watch, n_ctx=n_ctx)
