"""Conversion as a library call: choose a depth, fit, examine, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pop_converter.architecture.keys import trained_ctx
from pop_converter.architecture.shape import source_shape
from pop_converter.fit.least_squares import KvType
from pop_converter.fit.weights import Weights
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile import rewrite
from pop_converter.popfile.format import Measured, PopMeta
from pop_converter.popfile.plan import Plan, require_fit
from pop_converter.popfile.rewrite import Examine, Fitted, Sizes, check_target, measure
from pop_converter.popfile.sidecar import measure_sidecar, sidecar_path, write_sidecar
from pop_converter.projection import Projection
from pop_local.base.errors import PopError, StoppedError, WriteError
from pop_local.calibration.needs import (
    KINDS_OF_MANY,
    KINDS_OF_ONE,
    Needs,
    fit_needs,
    fit_seconds,
)
from pop_local.calibration.options import FitOptions
from pop_local.calibration.texts import N_WINDOW
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.measure.budget import BALANCED
from pop_local.models.names import resolve_base
from pop_local.models.stored import ModelFiles
from pop_local.workflows.events import Phase, Stopwatch, Unit, Watch
from pop_local.workflows.options import (
    Boundary,
    Depth,
    Fastest,
    Hardware,
    RowOptions,
    Skip,
    Within,
)
from pop_local.workflows.refusals import (
    CopyingBrokenError,
    OverBudgetError,
    RecallLostError,
    Trial,
)

if TYPE_CHECKING:
    from pop_local.workflows.examine import Examination
    from pop_local.workflows.fits import Distiller, MakeDistiller

STATE_SUFFIX = ".calibration"
# No model was seen to copy with fewer than a third of its layers left.
LEAST_DIVISOR = 3
OutputName = Literal["copy", "sidecar"]


@dataclass(frozen=True)
class Output:
    """One kind of output.

    `stage` names what writing it takes, `write` is the converter's function that does, and
    `files(source, written)` are what to open then.
    """

    name: OutputName
    stage: str
    measure: Callable[[Plan, Path, KvType], Sizes]
    default_path: Callable[[Source], Path]
    write: Callable[..., PopMeta]
    files: Callable[[Path, Path], ModelFiles]


def _copy_path(source: Source) -> Path:
    return source.first.path.with_name(f"{Path(source.name).stem}.pop.gguf")


OUTPUTS: dict[OutputName, Output] = {
    "copy": Output(
        "copy",
        "Writing, then reading back",
        measure,
        _copy_path,
        rewrite.convert,
        lambda src, written: ModelFiles(written),
    ),
    "sidecar": Output(
        "sidecar", "Reading the model", measure_sidecar, sidecar_path, write_sidecar, ModelFiles
    ),
}


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned; nothing is measured or written yet.

    `plans`: the one whose depth the caller named, or all that a search may choose, in its order.
    `sizes`: of the deepest. `fit`: None for own projections. `distiller`: None for plain fits.
    """

    source: Source
    target: Path
    output: Output
    depth: Depth
    plans: tuple[Plan, ...]
    sizes: Sizes
    fit: FitOptions | None
    hardware: Hardware
    distiller: MakeDistiller | None = None

    @property
    def path(self) -> Path:
        return self.source.first.path

    @property
    def deepest(self) -> Plan:
        return _deepest(self.plans)

    @cached_property
    def not_counted(self) -> str:
        """Why no plan's work can be counted, as without the backend; "" where it can."""
        try:
            _ = self.deepest.speedup_limit
        except PopError as error:
            return error.message
        return ""

    @cached_property
    def needs(self) -> Needs | None:
        """The memory and time of all plans' fits; None where there are none, or not counted."""
        if self.fit is None or not self._fitted or self.not_counted:
            return None
        return fit_needs(self._fitted, self.source, self.fit, self.kinds)

    @cached_property
    def fit_seconds(self) -> float | None:
        """About how long that takes."""
        return fit_seconds(self._fitted, self.fit, self.needs) if self.fit and self.needs else None

    def limit(self, plan: Plan) -> float | None:
        """The speed-up of a plan at most; None where its work cannot be counted."""
        return None if self.not_counted else plan.speedup_limit

    @property
    def _fitted(self) -> list[Plan]:
        return [*{p.boundary: p for p in self.plans if p.projection != Projection.OWN}.values()]

    @property
    def kinds(self) -> tuple[Projection, ...]:
        """The kinds of fit that are tried, if the fit leaves it open."""
        depth = self.depth.at if isinstance(self.depth, Within) else self.depth
        return KINDS_OF_ONE if isinstance(depth, (Skip, Boundary)) else KINDS_OF_MANY

    def sizes_of(self, plan: Plan) -> Sizes:
        """What writing one of the plans reads and writes, in bytes."""
        kv_type = (self.fit or FitOptions()).kv_type
        return self.output.measure(plan, self.path, kv_type)


@dataclass(frozen=True)
class Converted:
    """A written conversion. `meta` is what the file says of itself, its measured quality included.

    `warnings`: what was let through and might have been refused. `phases`: what took how long.
    """

    path: Path
    plan: Plan
    meta: PopMeta
    sizes: Sizes
    trials: tuple[Trial, ...]
    warnings: tuple[PopError, ...]
    phases: tuple[Phase, ...]


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    depth: Depth = Within(BALANCED),
    fit: FitOptions | None = FitOptions(),
    rows: RowOptions = RowOptions(),
    output: OutputName = "copy",
    resume: bool = False,
    force: bool = False,
    distiller: MakeDistiller | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Converted:
    """Convert a model, given by path or name, so that it reads long prompts faster.

    `depth` names a budget of quality, within which the deepest boundary is searched, or the depth
    itself, or both, or `Fastest()`, which chooses a selection, too. `fit` None leaves the skipped
    layers their own projections. `out` None is a name beside the model: NAME.pop.gguf, or
    NAME.pop-sidecar.gguf for a sidecar. With `resume` a fit that is stopped is kept beside `out`,
    and a kept one goes on. `distiller` (pop_local.research.distilled.Distiller) makes what trains
    the fit end to end. `force` replaces an existing output, and writes a depth that is named
    without a budget although it can no longer copy, or find facts again. Raises PopError:
    OutputExistsError, OverBudgetError, CopyingBrokenError and others; an earlier output stays then,
    and nothing new is left. Raises StoppedError when the watch says so.
    """
    planned = plan_conversion(
        model, out, depth, fit, rows, output, hardware, distiller, resume=resume
    )
    return run_conversion(planned, force=force, watch=watch)


def _deepest(plans: Sequence[Plan]) -> Plan:
    return min(plans, key=lambda plan: plan.boundary)


def plan_conversion(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    depth: Depth,
    fit: FitOptions | None,
    rows: RowOptions,
    output: OutputName,
    hardware: Hardware,
    distiller: MakeDistiller | None = None,
    *,
    resume: bool,
) -> Conversion:
    """Settle what `convert` would do, in milliseconds. Raises PopError for what it would refuse."""
    source = read_source(resolve_base(os.fspath(model)))
    shape = source_shape(source)
    kind = OUTPUTS[output]
    target = kind.default_path(source) if out is None else Path(out)
    if fit is not None:
        fit.require_text(shape.n_embd)
        if resume:
            fit = replace(fit, state_path=target.with_name(f".{target.name}{STATE_SUFFIX}"))
    projection = Projection.OWN if fit is None else fit.projection or Projection.FITTED
    if isinstance(depth, Within):
        if rows.select:
            raise PopError(
                "a search chooses the selection itself", "name the depth alone, or select nothing"
            )
        from pop_local.measure.depth import boundaries

        depths: Sequence[Skip | Boundary] = (
            [depth.at] if depth.at else [*map(Boundary, boundaries(shape, LEAST_DIVISOR))]
        )
    elif isinstance(depth, Fastest):
        depths = []
    else:
        depths = [depth]
    options = {"projection": projection, "macs": GraphMacs(source.first.path)} | vars(rows)
    plans = tuple(each.plan(shape, **options) for each in depths)
    if isinstance(depth, Fastest):
        from pop_local.workflows.fastest import recipes

        plans = recipes(shape, **options)
    if fit is not None:
        if fit.projection is not None:
            require_fit(plans)
        weights = Weights(source)
        for layer in {layer for plan in plans for layer in plan.fitted_layers}:
            weights.require_readable(layer)
    if distiller is not None:
        if fit is None or plans[0].select or fit.mmproj:
            raise PopError(
                "nothing is distilled of own projections, for selections or pictures",
                "take it as it is, or do without them",
                cause="not-distilled",
            )
        deepest = _deepest(plans)
        if fit.projection is None and deepest.projection != Projection.OWN:
            deepest = replace(deepest, projection=Projection.ATTENTION)
        distiller(source, fit, hardware, Watch()).require(deepest)
    kv_type = (fit or FitOptions()).kv_type
    sizes = kind.measure(_deepest(plans), source.first.path, kv_type)
    return Conversion(source, target, kind, depth, plans, sizes, fit, hardware, distiller)


def run_conversion(
    conversion: Conversion,
    *,
    force: bool = False,
    watch: Watch = Watch(),
) -> Converted:
    """Do what is planned; see `convert`."""
    check_target(conversion.path, conversion.target, conversion.sizes, force=force)
    warnings: list[PopError] = []

    def warned(error: PopError) -> None:
        warnings.append(error)
        watch.on_warning(error)

    _warn_of_short_contexts(conversion.source, warned)
    phases = Stopwatch()
    watched = replace(watch, on_warning=warned, on_stage=phases.before(watch.on_stage))
    run = _Run(conversion, force, watched)
    if isinstance(conversion.depth, Within):
        plan, meta, trials = run.within(conversion.depth)
    elif conversion.plans[0].select:
        plan, meta = run.with_selection(conversion.plans)
        trials = ()
    else:
        [plan] = conversion.plans
        meta, trials = run.as_named(plan), ()
    is_distilled = meta.calibration is not None and meta.calibration.n_distilled > 0
    plan = replace(plan, projection=meta.projection, is_distilled=is_distilled)
    return Converted(
        path=conversion.target,
        plan=plan,
        meta=meta,
        sizes=conversion.sizes_of(plan),
        trials=trials,
        warnings=tuple(warnings),
        phases=phases.stop(),
    )


def _warn_of_short_contexts(source: Source, warn: Callable[[PopError], object]) -> None:
    trained = trained_ctx(source.first)
    if trained is not None and 0 < trained < N_WINDOW:
        warn(
            PopError(
                f"the model was trained on {trained:,} tokens, fewer than are read at once here",
                "expect little of its figures",
            )
        )


@dataclass(frozen=True)
class _Run:
    """One conversion under way."""

    conversion: Conversion
    force: bool
    watch: Watch

    def within(self, depth: Within) -> tuple[Plan, PopMeta, tuple[Trial, ...]]:
        from pop_local.workflows.search import search

        planned = self.conversion
        options = planned.fit or FitOptions()
        is_named = depth.at is not None
        if any(plan.projection != Projection.OWN for plan in planned.plans):
            # A search finds out by itself which boundaries cannot copy.
            self._examination(planned.deepest, allow_broken_copy=not is_named).before_fit()
        with _resumable(options, self.watch, keeps_refused=is_named):
            chosen = search(
                planned.source,
                planned.plans,
                depth.budget,
                options,
                planned.hardware,
                self.watch,
                planned.kinds,
                self._distiller(),
            )
            meta = self._write(chosen.plan, chosen.fitted, lambda written: chosen.measured)
        return chosen.plan, meta, chosen.trials

    def with_selection(self, plans: Sequence[Plan]) -> tuple[Plan, PopMeta]:
        from pop_local.workflows.fastest import first_that_recalls
        from pop_local.workflows.measuring import measured

        planned = self.conversion
        options = planned.fit or FitOptions()
        with _resumable(options, self.watch):
            recipe = first_that_recalls(
                planned.source,
                plans,
                options,
                planned.hardware,
                self.watch,
                planned.kinds,
                takes_any=self.force and not isinstance(planned.depth, Fastest),
            )
            found = measured(recipe.quality)
            meta = self._write(recipe.plan, recipe.fitted, lambda written: found)
        return recipe.plan, meta

    def as_named(self, plan: Plan) -> PopMeta:
        if plan.projection == Projection.OWN:
            found = self._own(plan)
            return self._write(plan, None, None if found is None else lambda written: found)
        from pop_local.workflows.fits import Fitter

        planned = self.conversion
        assert planned.fit is not None, "own projections are fitted to nothing"
        examination = self._examination(plan, allow_broken_copy=self.force)
        examination.before_fit()
        with _resumable(planned.fit, self.watch):
            distiller = self._distiller()
            of = planned.source, planned.fit, planned.hardware, self.watch, planned.kinds
            fitter = Fitter(*of, distiller=distiller)
            [fitted] = fitter.fit((plan,), planned.fit.state_path)
            if distiller is not None:
                fitted = fitter.distilled(replace(plan, projection=fitted.projection), fitted)
            return self._write(
                plan,
                fitted,
                lambda written: examination.of_fit(planned.output.files(planned.path, written)),
            )

    def _distiller(self) -> Distiller | None:
        planned = self.conversion
        if planned.fit is None or planned.distiller is None:
            return None
        return planned.distiller(planned.source, planned.fit, planned.hardware, self.watch)

    def _own(self, plan: Plan) -> Measured | None:
        """What own projections lose; None where that cannot be measured, as without llama.cpp."""
        try:
            return self._examination(plan, allow_broken_copy=True).of_own()
        except PopError as error:
            message = f"what own projections lose is not known: {error.message}"
            self.watch.on_warning(PopError(message))
            return None

    def _examination(self, plan: Plan, *, allow_broken_copy: bool) -> Examination:
        from pop_local.workflows.examine import Examination

        src, hardware = self.conversion.path, self.conversion.hardware
        return Examination(plan, src, hardware, self.watch, allow_broken_copy)

    def _write(self, plan: Plan, fitted: Fitted | None, examine: Examine | None) -> PopMeta:
        planned = self.conversion
        output = planned.output
        advance = self.watch.stage(output.stage, Unit.BYTES)

        def examined(written: Path) -> Measured:
            assert examine is not None
            found = examine(written)
            self.watch.on_stage(output.stage, Unit.BYTES)
            return found

        return output.write(
            plan,
            planned.path,
            planned.target,
            fitted=fitted,
            examine=examine and examined,
            progress=advance,
            force=self.force,
        )


@contextmanager
def _resumable(options: FitOptions, watch: Watch, *, keeps_refused: bool = False) -> Iterator[None]:
    """Around a fit and what follows it: it is kept when that is stopped or cannot be written.

    `keeps_refused`: over a budget, too, since the same depth may be asked for with another one.
    """
    keeping: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit)
    keeping += (StoppedError, WriteError, *([OverBudgetError] if keeps_refused else []))
    try:
        yield
    except keeping as error:
        if kept := ", ".join(map(str, options.kept())):
            over = isinstance(error, OverBudgetError)
            again = "this depth with another budget, or none," if over else "the same conversion"
            watch.on_note(f"What was read is kept in {kept}: {again} goes on from there.")
        raise
    except (CopyingBrokenError, OverBudgetError, RecallLostError):
        _forget(options)
        raise
    _forget(options)


def _forget(options: FitOptions) -> None:
    for path in options.kept():
        path.unlink(missing_ok=True)
