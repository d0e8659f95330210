"""Analysis of a model: each layer's importance, and each boundary's loss and speed-up."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.base.errors import PopError
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Budget, Calibration
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.calibration import needs as memory
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.texts import default_tokens
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.prefill.plan import RowRule
from pop_local.measure import budget
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import Text, given_text, shipped_part, spread_windows, tokenize
from pop_local.measure.probes import N_REPEATED, require_passage
from pop_local.measure.quality import (
    QualityReference,
    QualitySettings,
    measure_against,
    read_reference,
)
from pop_local.models.model_files import ModelFiles
from pop_local.research.analyze_options import AnalyzeOptions
from pop_local.research.depths import DepthCost, deepest_within, measure_cliff, worth_measuring
from pop_local.research.importance import Importance, Windows, gates_device, importance
from pop_local.workflows.conversion.fits import PlanFitter
from pop_local.workflows.conversion.refusals import TooLittleMemoryError
from pop_local.workflows.conversion.stages import fit_stages
from pop_local.workflows.conversion.trial_runner import TrialRunner
from pop_local.workflows.events import PlannedStage, Watch
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import opened, row_options
from pop_local.workflows.open import base_file

# Number of random sequences. With two sequences, the retention has an error of some percent.
_N_DRAWS = 2
# A quarter of the tokens for `convert` is enough for comparing boundaries.
_FIT_SHARE = 4
# Time of a window's forward and backward passes in torch, relative to the window's prefill.
_GATES_COST = 4


@dataclass(frozen=True)
class Analysis:
    """The result of an analysis.

    `importance` is None without gates, and `calibration` is None without fits. `depths`: the
    boundaries in order of increasing depth, starting at the last layer. `chosen`: the deepest
    boundary that `budget` accepts with the measured figures.
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
        """The boundaries at which the model loses much of its ability to copy."""
        return tuple(depth for depth in self.depths if depth.is_cliff)


def analyze(
    model: str | os.PathLike[str],
    options: AnalyzeOptions = AnalyzeOptions(),
    *,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Analysis:
    """Measure each layer's importance, and each boundary's loss and speed-up.

    `model`: the path or name of an unconverted model. Without torch, or for an unsupported
    architecture, the layers' importance is not measured, and a warning states the reason. Raises
    PopError, StoppedError.
    """
    source = read_source(base_file(os.fspath(model), watch))
    require_unconverted(source)
    shipped = Text("prose of pop-local", (shipped_part("prose"),))
    text = given_text(options.text) if options.text else shipped
    run = _Run(source, source_shape(source), text, options, hardware, watch)
    require_passage(options.n_context, RowRule(run.ends.sink_tokens, run.ends.tail_tokens))
    if options.with_fit:
        run.require_memory()
    device = gates_device(source, options, hardware, watch) if options.n_gated else None
    n_gated = options.n_gated if device else 0
    watch.on_stages(run.planned_stages(n_gated))
    depths, reference, windows = run.probed(n_gated)
    if wanted := worth_measuring(depths):
        measured = {depth.boundary: depth for depth in run.measured(reference, wanted)}
        depths = tuple(measured.get(depth.boundary, depth) for depth in depths)
    gates = None if device is None else importance(source, device, windows, options, watch)
    return Analysis(
        model=source.first.path,
        text=text,
        seed=options.seed,
        importance=gates,
        depths=depths,
        calibration=next((depth.calibration for depth in depths if depth.calibration), None),
        budget=budget.BALANCED,
        chosen=deepest_within(budget.BALANCED, depths),
    )


def require_unconverted(source: Source) -> None:
    """Raise PopError if the model file is converted."""
    path = source.first.path
    if pop_of(source, None) is not None:
        raise PopError(
            f"{path} is converted already",
            "analyze the original model, which strip restores",
            cause="analyze-converted",
            path=path,
        )


@dataclass(frozen=True)
class _Run:
    """A running analysis."""

    source: Source
    shape: ModelShape
    text: Text
    options: AnalyzeOptions
    hardware: Hardware
    watch: Watch

    @property
    def ends(self) -> Plan:
        """The plan of skipping the last layer, with the same full rows as a conversion."""
        return self._plan(self.shape.n_layer - 1)

    @property
    def _fitted(self) -> list[Plan]:
        return [
            plan for plan in map(self._plan, budget.boundaries(self.shape)) if plan.fitted_layers
        ]

    @cached_property
    def _needs(self) -> memory.FitNeeds | None:
        plans = self._fitted if self.options.with_fit else []
        return memory.fit_needs(plans, self.source, self._fit_options()) if plans else None

    def planned_stages(self, n_gated: int) -> tuple[PlannedStage, ...]:
        """Return the analysis's possible stages; `n_gated`: the number of windows for the gates."""
        options, ends, n_tried = self.options, self.ends, len(budget.boundaries(self.shape))
        draws = _N_DRAWS * memory.reading_work(ends, 2 * N_REPEATED)
        probes = options.n_probed * memory.reading_work(ends, options.n_window) + draws
        gates = _GATES_COST * n_gated * memory.reading_work(ends, options.n_window)
        fit = None
        if self._needs:
            fit = memory.fit_work(self._fitted, self._fit_options(), self._needs)
        return (
            PlannedStage("Running the full model", probes),
            PlannedStage("Measuring copying by boundary", n_tried * draws),
            *fit_stages(fit),
            PlannedStage("Measuring boundary", probes, n_tried),
            *([PlannedStage("Virtual gates", gates)] if n_gated else []),
        )

    def require_memory(self) -> None:
        """Raise PopError if too little memory is free for the fits."""
        if (needs := self._needs) is None:
            return
        free_bytes = memory.free_bytes()
        needed_bytes = needs.total_bytes + self.source.size_bytes
        if needed_bytes > free_bytes:
            raise TooLittleMemoryError(
                "the fit needs",
                needed_bytes,
                free_bytes,
                "fit on fewer tokens, close other programs, or measure without a fit",
                cause="no-memory-for-fit",
            )

    def probed(self, n_gated: int) -> tuple[tuple[DepthCost, ...], QualityReference, Windows]:
        """Run the full model, then measure each boundary's retention. Raises PopError.

        Return the boundaries with their retentions, the full model's scores, and `n_gated` windows.
        """
        options = self.options
        n_probed, n_context, n_answer = options.n_probed, options.n_context, options.n_answer
        settings = QualitySettings(
            n_probed, n_context, n_answer, seed=options.seed, n_draws=_N_DRAWS
        )
        files, rows = ModelFiles(self.source.first.path), row_options(self.ends)
        with opened(files, self.hardware, self.watch, n_ctx=self._n_ctx, **rows) as model:
            tokens = tokenize(model, self.text)
            start = model.engine.context.vocabulary.bos
            texts = spread_windows(tokens, n_gated, options.n_window - len(start))
            advance = self.watch.stage("Running the full model")
            reference = read_reference(model, tokens, settings, advance)
            depths = measure_cliff(
                model, reference, self.watch.stage("Measuring copying by boundary")
            )
        return depths, reference, [[*start, *text] for text in texts]

    def measured(self, reference: QualityReference, tried: Sequence[DepthCost]) -> list[DepthCost]:
        """Measure the boundaries `tried` on prose.

        If the options request fits, one pass first fits all boundaries.
        """
        runner = TrialRunner(self.source, self.hardware, self.watch)
        plans, options = [self._plan(depth.boundary) for depth in tried], self._fit_options()
        if not self.options.with_fit:
            plans = [replace(plan, projection=Projection.OWN) for plan in plans]
        runner.require_room(plans, options.kv_type)
        to_fit = [plan for plan in plans if plan.projection != Projection.OWN]
        fits = dict(zip(to_fit, PlanFitter(runner, options).fit(to_fit, None), strict=True))
        found = []
        for depth, plan in zip(tried, plans, strict=True):
            fitted = fits.get(plan)
            with runner.tried(plan, fitted, n_ctx=self._n_ctx) as model:
                advance = self.watch.stage(f"Measuring boundary {plan.boundary}")
                quality = measure_against(reference, model, Pruning(plan.boundary), advance)
            calibration = None if fitted is None else fitted.calibration
            measured = replace(depth, quality=quality, projection=plan.projection)
            found.append(replace(measured, calibration=calibration))
        return found

    def _plan(self, boundary: int) -> Plan:
        return make_plan(
            self.shape, boundary=boundary, projection=Projection.FITTED, macs=self._macs
        )

    @cached_property
    def _macs(self) -> GraphMacs:
        return GraphMacs(self.source.first.path)

    def _fit_options(self) -> FitOptions:
        n_tokens = self.options.fit_tokens or default_tokens(self.shape.n_embd) // _FIT_SHARE
        return FitOptions(n_tokens, projection=Projection.FITTED)

    @property
    def _n_ctx(self) -> int:
        return max(self.options.n_window, 2 * N_REPEATED + 1)
