"""Plan conversions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.architecture.shape import source_shape
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Budget, DeepRows, PopMeta
from pop_converter.popfile.pruning_plan import Plan, make_plan, require_fit
from pop_converter.popfile.rewrite import FileSizes
from pop_converter.popfile.rewrite import measure as measure_copy
from pop_converter.popfile.sidecar import measure_sidecar, sidecar_path
from pop_converter.projection import Projection
from pop_local.calibration import needs as costs
from pop_local.calibration.fit_options import FitOptions
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.measure.budget import BALANCED, boundaries
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality
from pop_local.models.model_files import ModelFiles
from pop_local.models.model_names import resolve
from pop_local.workflows.conversion.duration import sidecar_seconds
from pop_local.workflows.conversion.fits import MakeDistiller
from pop_local.workflows.hardware import Hardware

# No measured model can copy from its prompt with fewer than a third of its layers
# (docs/quality.md).
LEAST_DIVISOR = 3


@dataclass(frozen=True)
class Boundary:
    """The first layer that context tokens skip."""

    layer: int


@dataclass(frozen=True)
class Within:
    """The goal of meeting a budget at boundary `at` (None: at the fastest possible boundary)."""

    budget: Budget
    at: Boundary | None = None


Goal = Boundary | Within


@dataclass(frozen=True)
class ConvertOptions:
    """Options for a conversion.

    `goal` is either a named boundary (`Boundary`) or a budget for a search (`Within`). If
    `fit` is None, the skipped layers keep their own projections. Words selected by `deep_rows` run
    through all layers. `distiller` creates the trainer that distills the fit (None: no
    distillation).
    """

    goal: Goal = Within(BALANCED)
    fit: FitOptions | None = FitOptions()
    deep_rows: DeepRows = DeepRows.NAMES
    output: Literal["copy", "sidecar"] = "copy"
    distiller: MakeDistiller | None = None
    hardware: Hardware = Hardware()


@dataclass(frozen=True)
class Conversion:
    """A planned conversion, before any measurement or output.

    `plans` contains one plan if the goal names a boundary, or all plans of the search otherwise.
    """

    source: Source
    target: Path
    plans: tuple[Plan, ...]
    options: ConvertOptions

    @property
    def path(self) -> Path:
        return self.source.first.path

    @property
    def fit(self) -> FitOptions | None:
        return self.options.fit

    @property
    def budget(self) -> Budget | None:
        goal = self.options.goal
        return goal.budget if isinstance(goal, Within) else None

    @property
    def is_named(self) -> bool:
        """Return True if the goal names a boundary, in which case no search is needed."""
        goal = self.options.goal
        return not (isinstance(goal, Within) and goal.at is None)

    @property
    def deepest(self) -> Plan:
        return self.plans[-1]

    @cached_property
    def needs(self) -> costs.FitNeeds | None:
        """Return the passes of the fits, or None if nothing is fitted."""
        fitted = [plan for plan in self.tried if plan.projection != Projection.OWN]
        if self.fit is None or not fitted:
            return None
        return costs.fit_needs(fitted, self.fit)

    @cached_property
    def seconds(self) -> float | None:
        """Return a search's estimated duration (None: no search, or one with distillation)."""
        if self.is_named or self.fit is None or self.options.distiller:
            return None
        return sidecar_seconds(self.source)

    @cached_property
    def tried(self) -> Sequence[Plan]:
        """Return the plans that a search may try. If fits need too much memory, omit some plans."""
        if self.fit is None or self.budget is None:
            return self.plans
        return costs.thin_out(self.plans, self.fit)

    @cached_property
    def sizes(self) -> FileSizes:
        """Return the sizes of the model and of the output that the deepest plan would produce."""
        return self.sizes_of(self.deepest)

    def sizes_of(self, plan: Plan) -> FileSizes:
        """Return the sizes of the model and of the output that the given plan would produce."""
        kv_type = (self.fit or FitOptions()).kv_type
        measure = measure_sidecar if self.is_sidecar else measure_copy
        return measure(plan, self.path, kv_type)

    @property
    def is_sidecar(self) -> bool:
        return self.options.output == "sidecar"

    def files(self, written: Path) -> ModelFiles:
        """Return the converted model's files. `written`: the path of the output file."""
        return ModelFiles(self.path, written) if self.is_sidecar else ModelFiles(written)


def plan_conversion(
    model: str | os.PathLike[str], out: str | os.PathLike[str] | None, options: ConvertOptions
) -> Conversion:
    """Plan a conversion without opening the model. Raises PopError if conversion is impossible."""
    source = read_source(resolve(os.fspath(model), base=True))
    shape, fit = source_shape(source), options.fit
    default = source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")
    if options.output == "sidecar":
        default = sidecar_path(source)
    target = default if out is None else Path(out)
    if fit is not None:
        fit.require_text(shape.n_embd)
    projection = Projection.OWN if fit is None else fit.projection or Projection.FITTED
    named = options.goal.at if isinstance(options.goal, Within) else options.goal
    layers = boundaries(shape, LEAST_DIVISOR) if named is None else (named.layer,)
    rows, macs = options.deep_rows, GraphMacs(source.first.path)
    plans = tuple(
        make_plan(shape, boundary=layer, projection=projection, deep_rows=rows, macs=macs)
        for layer in layers
    )
    if fit is not None:
        if fit.projection is not None:
            require_fit(plans)
        weights = Weights(source)
        for layer in {layer for plan in plans for layer in plan.fitted_layers}:
            weights.require_readable(layer)
    if options.distiller is not None:
        if fit is None:
            raise PopError(
                "the model's own projections cannot be distilled",
                "convert with a fit, or turn distillation off",
                cause="not-distilled",
            )
        deepest = plans[-1]
        if fit.projection is None and deepest.projection != Projection.OWN:
            deepest = replace(deepest, projection=Projection.WIDE)
        options.distiller(source, fit, options.hardware, Watch()).require(deepest)
    return Conversion(source, target, plans, options)


class CopyingBrokenError(PopError):
    """Error for a model that can no longer copy from its prompt. `found` is the measured loss."""

    def __init__(self, boundary: int, figures: str) -> None:
        hint = "skip fewer layers, or set a budget instead of a boundary"
        message = f"at boundary {boundary}, the model can no longer copy from its prompt: {figures}"
        super().__init__(message, hint, cause="copying-broken")


@dataclass(frozen=True)
class Trial:
    """A measured candidate.

    `lookups` is None if the loss on held-out text already exceeds the budget.
    """

    plan: Plan
    quality: Quality
    in_budget: bool
    lookups: Lookups | None = None


class OverBudgetError(PopError):
    """Error for a budget that no candidate meets. `trials` lists the measured candidates."""

    def __init__(self, message: str, trials: tuple[Trial, ...]) -> None:
        super().__init__(message, "use a larger budget, or choose a boundary", cause="over-budget")
        self.trials = trials


@dataclass(frozen=True)
class Converted:
    """A finished conversion. `meta` contains the output's keys, including the measured loss."""

    path: Path
    plan: Plan
    meta: PopMeta
    sizes: FileSizes
    trials: tuple[Trial, ...]
    warnings: tuple[PopError, ...] = ()
