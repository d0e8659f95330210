"""The quality that pruning leaves: a model measured at one boundary or several, fitted or not."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pop_converter.architecture.keys import trained_ctx
from pop_converter.architecture.shape import ModelShape, source_shape
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.base.errors import PopError
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import Calibration
from pop_converter.popfile.plan import Plan, make_plan, require_fit, require_prunable
from pop_converter.popfile.rewrite import stored_type
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.calibration.options import FitOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning, always_skip, forced
from pop_local.measure.heldout import Text, TextTokens, given_text, shipped_text, tokenize
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import Quality, QualitySettings, choose_windows, measure_prunings
from pop_local.measure.recall import (
    N_AROUND,
    Recall,
    RecallSettings,
    make_documents,
    measure_recall,
)
from pop_local.models.stored import ModelFiles
from pop_local.workflows.conversion.fits import measure_fits
from pop_local.workflows.conversion.goals import Named
from pop_local.workflows.events import Watch
from pop_local.workflows.measuring import opened
from pop_local.workflows.open import files_at_boundary, model_files
from pop_local.workflows.options import Hardware

Baseline = Literal["always-skip"]


@dataclass(frozen=True)
class EvaluateOptions:
    """How to measure. `text`: a file, None for the shipped held-out text.

    `recall`: tokens of the documents that facts are asked of, none of them for no such question;
    `n_documents` of each length. `select`: the share of context rows that run all layers, as the
    question needs them, None for the file's. `n_refilled`: rows that are given their depth with
    each token of the continuation. `n_ctx`: None for as much as is needed.
    """

    text: Path | None = None
    settings: QualitySettings = field(default_factory=QualitySettings)
    recall: tuple[int, ...] = (512,)
    n_documents: int = 24
    select: float | None = None
    n_refilled: int = 0
    baseline: Baseline | None = None
    n_ctx: int | None = None


@dataclass(frozen=True)
class Row:
    """One boundary; `speedup_limit` by multiply-accumulates, `recall` by length of the documents.

    `always_skip`: the baseline that skips the same layers for every token, None if not measured.
    `calibration`, `kv_type`: of fitted projections, else None.
    """

    n_skipped: int
    projection: str
    speedup_limit: float
    quality: Quality
    recall: tuple[Recall, ...]
    select: float = 0.0
    n_refilled: int = 0
    always_skip: Quality | None = None
    calibration: Calibration | None = None
    kv_type: KvType | None = None


@dataclass(frozen=True)
class Evaluation:
    """The rows of all boundaries, in the order in which they were asked for."""

    model: Path
    text: Text
    rows: tuple[Row, ...]


def evaluate(
    model: str | os.PathLike[str],
    options: EvaluateOptions = EvaluateOptions(),
    *,
    at: Sequence[Named] = (),
    fit: FitOptions | None = None,
    sidecar: Path | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Evaluation:
    """Measure what pruning costs a model, given by path or name.

    `at`: none for the boundary of the converted file. `fit` fits the projections at each one first.
    Without it, other boundaries than the file's have own projections. Raises PopError, and
    StoppedError.
    """
    find = files_at_boundary if fit is not None or at else model_files
    files = find(os.fspath(model), sidecar, watch)
    source = read_source(files.path)
    shape = source_shape(source)
    boundaries = _boundaries(source, files, shape, at)
    text = shipped_text() if options.text is None else given_text(options.text)
    run = _Run(source, shape, options, text, hardware, watch)
    if fit is None:
        _require_projections(source, files.sidecar, boundaries)
        rows = run.rows(boundaries, files.sidecar)
    else:
        fit.require_text(shape.n_embd)
        rows = run.fitted(boundaries, fit)
    return Evaluation(files.path, text, rows)


def _boundaries(
    source: Source, files: ModelFiles, shape: ModelShape, at: Sequence[Named]
) -> tuple[int, ...]:
    """Return those given, else the file's."""
    if at:
        return tuple(dict.fromkeys(each.plan(shape).boundary for each in at))
    meta = pop_of(source, files.sidecar)
    if meta is None:
        require_prunable(shape)
        raise PopError(
            f"{source.first.path} is not converted: there is nothing to measure",
            "convert it, or say at which boundary to measure it",
            cause="nothing-to-evaluate",
            model=source.first.path,
        )
    return (meta.boundary,)


def _require_projections(source: Source, sidecar: Path | None, boundaries: Sequence[int]) -> None:
    """Raises PopError where there are none at one of the boundaries."""
    meta = pop_of(source, sidecar)
    if meta is not None and meta.is_fitted and set(boundaries) != {meta.boundary}:
        raise PopError(
            f"{sidecar or source.first.path} has projections for boundary {meta.boundary} only",
            f"measure other boundaries on the model itself, {meta.source_name}, fitted or not",
            cause="projections-for-one-boundary",
            model=meta.source_name,
        )


@dataclass(frozen=True)
class _Run:
    """One evaluation under way."""

    source: Source
    shape: ModelShape
    options: EvaluateOptions
    text: Text
    hardware: Hardware
    watch: Watch

    def fitted(self, boundaries: Sequence[int], fit: FitOptions) -> tuple[Row, ...]:
        """Measure each boundary with a fit of its own. Raises PopError, StoppedError."""
        macs = GraphMacs(self.source.first.path)
        plans = [
            make_plan(self.shape, boundary=b, projection=Projection.FITTED, macs=macs)
            for b in boundaries
        ]
        require_fit(plans)
        with self._opened(None):
            pass  # a text too short is an error before minutes of fitting

        def measure(plan: Plan, sidecar: Path) -> Row:
            [row] = self.rows((plan.boundary,), sidecar)
            return row

        return tuple(measure_fits(plans, self.source, fit, self.hardware, self.watch, measure))

    def rows(self, boundaries: Sequence[int], sidecar: Path | None) -> tuple[Row, ...]:
        """Measure the boundaries on one loaded model. Raises PopError, StoppedError."""
        options, settings, meta = self.options, self.options.settings, pop_of(self.source, sidecar)
        select = options.select or 0.0
        pops = [
            Pruning(boundary, settings.mode, select=select, n_refilled=options.n_refilled)
            for boundary in boundaries
        ]
        always = [always_skip(boundary) for boundary in boundaries if options.baseline is not None]
        with self._opened(sidecar) as (model, tokens):
            advance = self.watch.stage("Measuring")
            qualities = measure_prunings(model, tokens, settings, [*pops, *always], advance)
            recalls = [
                measure_recall(model, self._asked(n), pops, self.watch.stage("Asking"))
                for n in self._recall
            ]
            n_full = model.rule.sink_tokens + model.rule.tail_tokens
            n_full += round(select * (LIMIT_PROMPT - n_full))
            limits = [speedup_limit(model.macs, LIMIT_PROMPT, b, n_full) for b in boundaries]
        tensors = self.source.tensors if sidecar is None else read_header(sidecar).tensors
        return tuple(
            Row(
                n_skipped=self.shape.n_layer - boundary,
                projection=Projection.OWN if meta is None else meta.projection,
                calibration=None if meta is None else meta.calibration,
                kv_type=stored_type(tensors),
                speedup_limit=limits[number],
                quality=qualities[number],
                recall=tuple(of_length[number] for of_length in recalls),
                select=select,
                n_refilled=options.n_refilled,
                always_skip=qualities[len(pops) + number] if always else None,
            )
            for number, boundary in enumerate(boundaries)
        )

    @property
    def _recall(self) -> tuple[int, ...]:
        """None in other modes: generated tokens would be pruned as well, or nothing would be."""
        return self.options.recall if self.options.settings.mode is Mode.CONTEXT else ()

    def _asked(self, n_tokens: int) -> RecallSettings:
        return RecallSettings(self.options.n_documents, n_tokens, self.options.settings.seed)

    @contextmanager
    def _opened(self, sidecar: Path | None) -> Iterator[tuple[PopModel, TextTokens]]:
        """The model, and the text in its tokens.

        Raises PopError where it has no room for the windows, or documents for their facts.
        """
        files = ModelFiles(self.source.first.path, sidecar)
        with opened(files, self.hardware, self.watch, n_ctx=self._n_ctx()) as model:
            tokens = tokenize(model, self.text)
            with forced(model) as reader:
                choose_windows(reader, tokens, self.options.settings)
            if self._recall:
                make_documents(model, self._asked(min(self._recall)))
            yield model, tokens

    def _n_ctx(self) -> int:
        """Return the context in tokens that is opened. Raises PopError when it is too small."""
        settings, given = self.options.settings, self.options.n_ctx
        windows = settings.n_context + settings.n_continuation
        asked = max(self._recall, default=-N_AROUND) + N_AROUND
        needed = max(windows, 2 * N_REPEATED + 1, asked)
        trained = trained_ctx(self.source.first)
        limit, there = given or trained, "are given" if given else "are all that the model has"
        if limit is not None and limit < needed:
            raise PopError(
                f"{needed} tokens of context are needed, {limit} {there}",
                "give shorter windows, or documents",
                cause="windows-too-long",
            )
        return given or needed
