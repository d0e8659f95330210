"""Measure the quality that pruning leaves, at one boundary, fitted or not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.base.errors import PopError
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Calibration, DeepRows
from pop_converter.popfile.pruning_plan import Plan, make_plan, require_fit, require_prunable
from pop_converter.popfile.rewrite import stored_type
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.calibration.fit_options import FitOptions
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import Text, TextTokens, given_text, shipped_text, tokenize
from pop_local.measure.lookups import Lookups, LookupSettings, measure_lookups
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import Quality, QualitySettings, choose_windows, measure_prunings
from pop_local.measure.verdict import verdict_in_words
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.conversion.fits import measure_fits
from pop_local.workflows.conversion.goals import Named
from pop_local.workflows.events import Watch
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import measured, opened
from pop_local.workflows.open import files_at_boundary, model_files


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation. `text`: a file (default: the shipped held-out text).

    `n_lookups`: questions about exact strings of documents, 0 for none. `deep_rows`: which context
    rows run all layers because of their tokens (default: the file's). `n_ctx`: context length in
    tokens (default: as needed).
    """

    text: Path | None = None
    settings: QualitySettings = field(default_factory=QualitySettings)
    n_lookups: int = 100
    deep_rows: DeepRows | None = None
    n_ctx: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The quality of a model that is pruned at a boundary, on a text.

    `speedup_limit`: by multiply-accumulates. `lookups`: None if not measured. `calibration`,
    `kv_type`: those of fitted projections, else None.
    """

    model: Path
    text: Text
    n_skipped: int
    projection: str
    speedup_limit: float
    quality: Quality
    lookups: Lookups | None
    deep_rows: DeepRows = DeepRows.NONE
    calibration: Calibration | None = None
    kv_type: KvType | None = None

    @property
    def verdict(self) -> str:
        """Return the verdict in words. Raises PopError if a figure is not a number."""
        return verdict_in_words(measured(self.quality, self.lookups))


def evaluate(
    model: str | os.PathLike[str],
    options: EvaluateOptions = EvaluateOptions(),
    *,
    at: Named | None = None,
    fit: FitOptions | None = None,
    sidecar: Path | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Evaluation:
    """Measure what pruning costs a model, given by path or name.

    `at`: the boundary to measure (default: the converted file's). `fit`: fit the projections first.
    Without it, other boundaries than the file's use the model's own projections. Raises
    PopError and StoppedError.
    """
    find = model_files if fit is None and at is None else files_at_boundary
    files = find(os.fspath(model), sidecar, watch)
    source = read_source(files.path)
    shape = source_shape(source)
    boundary = _boundary(source, files, shape) if at is None else at.plan(shape).boundary
    text = shipped_text() if options.text is None else given_text(options.text)
    run = _EvaluationRun(source, shape, options, text, hardware, watch)
    if fit is not None:
        fit.require_text(shape.n_embd)
        return run.fitted(boundary, fit)
    _require_projections(source, files.sidecar, boundary)
    return run.measured(boundary, files.sidecar)


def _boundary(source: Source, files: ModelFiles, shape: ModelShape) -> int:
    """Return the boundary of a converted file. Raises PopError for an unconverted one."""
    meta = pop_of(source, files.sidecar)
    if meta is not None:
        return meta.boundary
    require_prunable(shape)
    raise PopError(
        f"{source.first.path} is not converted, so it has no boundary to measure",
        "convert it, or choose a boundary",
        cause="nothing-to-evaluate",
        model=source.first.path,
    )


def _require_projections(source: Source, sidecar: Path | None, boundary: int) -> None:
    """Raise PopError if fitted projections exist only for another boundary."""
    meta = pop_of(source, sidecar)
    if meta is not None and meta.is_fitted and boundary != meta.boundary:
        raise PopError(
            f"{sidecar or source.first.path} has projections for boundary {meta.boundary} only",
            f"measure other boundaries on the model itself, {meta.source_name}, fitted or not",
            cause="projections-for-one-boundary",
            model=meta.source_name,
        )


@dataclass(frozen=True)
class _EvaluationRun:
    """The inputs of an evaluation."""

    source: Source
    shape: ModelShape
    options: EvaluateOptions
    text: Text
    hardware: Hardware
    watch: Watch

    def fitted(self, boundary: int, fit: FitOptions) -> Evaluation:
        """Measure a fit for the boundary. Raises PopError, StoppedError."""
        macs = GraphMacs(self.source.first.path)
        plan = make_plan(self.shape, boundary=boundary, projection=Projection.FITTED, macs=macs)
        require_fit([plan])
        with self._opened(None):
            pass  # a text too short is an error before minutes of fitting

        def measure(plan: Plan, sidecar: Path) -> Evaluation:
            return self.measured(plan.boundary, sidecar)

        [found] = measure_fits([plan], self.source, fit, self.hardware, self.watch, measure)
        return found

    def measured(self, boundary: int, sidecar: Path | None) -> Evaluation:
        """Measure the boundary with a sidecar's projections. Raises PopError, StoppedError."""
        options, meta = self.options, pop_of(self.source, sidecar)
        pruning = Pruning(boundary)
        with self._opened(sidecar) as (model, tokens):
            deep_rows = model.engine.rule.deep_rows
            advance = self.watch.stage("Measuring")
            [quality] = measure_prunings(model, tokens, options.settings, [pruning], advance)
            lookups = self._lookups(model, pruning)
            n_full = model.engine.rule.sink_tokens + model.engine.rule.tail_tokens
            n_context = quality.n_windows * (quality.n_context - n_full)
            n_full += round((1 - quality.n_pruned / n_context) * (LIMIT_PROMPT - n_full))
            limit = speedup_limit(model.engine.context.macs, LIMIT_PROMPT, boundary, n_full)
        tensors = self.source.tensors if sidecar is None else read_header(sidecar).tensors
        return Evaluation(
            model=self.source.first.path,
            text=self.text,
            n_skipped=self.shape.n_layer - boundary,
            projection=Projection.OWN if meta is None else meta.projection,
            speedup_limit=limit,
            quality=quality,
            lookups=lookups,
            deep_rows=deep_rows,
            calibration=None if meta is None else meta.calibration,
            kv_type=stored_type(tensors),
        )

    def _lookups(self, model: PopModel, pruning: Pruning) -> Lookups | None:
        if self._asked is None:
            return None
        advance = self.watch.stage("Asking for look-ups")
        [found] = measure_lookups(model, self._asked, [pruning], advance)
        return found

    @property
    def _asked(self) -> LookupSettings | None:
        n, seed = self.options.n_lookups, self.options.settings.seed
        return LookupSettings.of_questions(n, seed) if n else None

    @contextmanager
    def _opened(self, sidecar: Path | None) -> Iterator[tuple[PopModel, TextTokens]]:
        """The model, and the text in its tokens.

        Raises PopError where it has no room for the windows.
        """
        files = ModelFiles(self.source.first.path, sidecar)
        rows = {"deep_rows": self.options.deep_rows}
        with opened(files, self.hardware, self.watch, n_ctx=self._n_ctx(), **rows) as model:
            tokens = tokenize(model, self.text)
            with forced(model) as reader:
                choose_windows(reader, tokens, self.options.settings)
            yield model, tokens

    def _n_ctx(self) -> int:
        """Return the context in tokens that is opened. Raises PopError when it is too small."""
        settings, given = self.options.settings, self.options.n_ctx
        windows = settings.n_context + settings.n_continuation
        asked = self._asked.n_ctx if self._asked else 0
        needed = max(windows, 2 * N_REPEATED + 1, asked)
        trained = trained_ctx(self.source.first)
        limit, there = given or trained, "are given" if given else "are all that the model has"
        if limit is not None and limit < needed:
            raise PopError(
                f"{needed} tokens of context are needed, {limit} {there}",
                "give shorter windows, or ask for no look-ups",
                cause="windows-too-long",
            )
        return given or needed
