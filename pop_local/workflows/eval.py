"""Evaluate how much quality a model loses when it is pruned at one boundary."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.architecture.arch_keys import trained_ctx
from pop_converter.architecture.shape import source_shape
from pop_converter.architecture.work import LIMIT_PROMPT, speedup_limit
from pop_converter.gguf.source import Source, read_source
from pop_converter.popfile.format import DeepRows
from pop_converter.popfile.pruning_plan import require_prunable
from pop_converter.popfile.sidecar import pop_of
from pop_converter.projection import Projection
from pop_local.engine.prefill.plan import RowRule
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import Text, given_text, shipped_text, tokenize
from pop_local.measure.lookups import Lookups, LookupSettings, measure_lookups
from pop_local.measure.probes import N_REPEATED
from pop_local.measure.quality import Quality, QualitySettings, measure_pruning
from pop_local.measure.verdict import verdict_in_words
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import not_converted, opened, stored_metrics
from pop_local.workflows.open import model_files


@dataclass(frozen=True)
class EvaluateOptions:
    """Options for an evaluation.

    `text` is a text file (default: the shipped held-out text). `n_lookups` is the number of
    questions about exact strings in documents. `deep_rows` selects words whose tokens run through
    all layers (default: the file's rule). `n_ctx` is the context length in tokens (default: the
    length that the measurement needs).
    """

    text: Path | None = None
    settings: QualitySettings = field(default_factory=QualitySettings)
    n_lookups: int = 100
    deep_rows: DeepRows | None = None
    n_ctx: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The quality loss of a model that is pruned at one boundary.

    `speedup_limit` is the number of multiply-accumulates in a full prefill, divided by the number
    in a pruned prefill.
    """

    model: Path
    text: Text
    n_skipped: int
    projection: Projection
    speedup_limit: float
    quality: Quality
    lookups: Lookups | None
    deep_rows: DeepRows = DeepRows.NONE

    @property
    def verdict(self) -> str:
        """Describe the loss. Raises PopError if a metric is NaN."""
        return verdict_in_words(stored_metrics(self.quality, self.lookups))


def evaluate(
    model: str | os.PathLike[str],
    options: EvaluateOptions = EvaluateOptions(),
    *,
    sidecar: Path | None = None,
    hardware: Hardware = Hardware(),
    watch: Watch = Watch(),
) -> Evaluation:
    """Measure the loss from pruning a converted model, given its path or name.

    Raises PopError or StoppedError.
    """
    files = model_files(os.fspath(model), sidecar, watch)
    source = read_source(files.path)
    shape, meta = source_shape(source), pop_of(source, files.sidecar)
    if meta is None:
        require_prunable(shape)
        why = ", so it has no boundary to measure"
        raise not_converted(model=files.path, cause="nothing-to-evaluate", consequence=why)
    text = shipped_text() if options.text is None else given_text(options.text)
    lookup_settings = None
    if options.n_lookups:
        lookup_settings = LookupSettings.of_questions(options.n_lookups, options.settings.seed)
    n_ctx, pruning = _n_ctx(source, options, lookup_settings), Pruning(meta.boundary)
    with opened(files, hardware, watch, n_ctx=n_ctx, deep_rows=options.deep_rows) as loaded:
        rule, tokens = loaded.engine.sequences[0].rule, tokenize(loaded, text)
        advance = watch.stage("Measuring")
        quality = measure_pruning(loaded, tokens, options.settings, pruning, advance)
        lookups = None
        if lookup_settings is not None:
            lookups = measure_lookups(
                loaded, lookup_settings, pruning, watch.stage("Running look-ups")
            )
        macs = loaded.engine.context.files.macs
        limit = speedup_limit(macs, LIMIT_PROMPT, meta.boundary, _n_full(rule, quality))
    return Evaluation(
        model=files.path,
        text=text,
        n_skipped=shape.n_layer - meta.boundary,
        projection=meta.projection,
        speedup_limit=limit,
        quality=quality,
        lookups=lookups,
        deep_rows=rule.deep_rows,
    )


def _n_full(rule: RowRule, quality: Quality) -> int:
    """Return how many rows of a prompt of LIMIT_PROMPT tokens run through all layers."""
    n_ends = rule.sink_tokens + rule.tail_tokens
    n_context = quality.n_windows * (quality.n_context - n_ends)
    return n_ends + round((1 - quality.n_pruned / n_context) * (LIMIT_PROMPT - n_ends))


def _n_ctx(source: Source, options: EvaluateOptions, lookups: LookupSettings | None) -> int:
    """Return the context length in tokens. Raises PopError if the windows need a longer context."""
    settings, n_ctx = options.settings, options.n_ctx
    n_window = settings.n_context + settings.n_continuation
    needed = max(n_window, 2 * N_REPEATED + 1, lookups.n_ctx if lookups else 0)
    limit = n_ctx or trained_ctx(source.first)
    if limit is not None and limit < needed:
        raise PopError(
            f"the measurement needs a context of {needed} tokens, but the limit is {limit}",
            "use shorter windows, or turn off look-ups",
            cause="windows-too-long",
        )
    return n_ctx or needed
