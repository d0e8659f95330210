"""Measure a source model, either unchanged or with a temporary sidecar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pop_base.progress import Watch
from pop_converter.fit.least_squares import KvType
from pop_converter.gguf.source import Source
from pop_converter.popfile.format import Binding, DeepRows
from pop_converter.popfile.pruning_plan import Plan
from pop_converter.popfile.rewrite import Fitted, check_target
from pop_converter.popfile.sidecar import bind, measure_sidecar, write_trial
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.deep_rows import find_deep_rows
from pop_local.measure.heldout import shipped_text, tokenize
from pop_local.measure.lookups import LookupReference, LookupSettings
from pop_local.measure.quality import (
    QualityReference,
    QualitySettings,
    read_reference,
)
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import opened, row_options

# With 16 windows, the mean KL has a relative standard error of 20% or less.
N_WINDOWS = 16
N_DOCUMENTS = 10
_PREFIX = "pop-local-"
_NAME = "fitted.gguf"


@dataclass(frozen=True)
class TrialRunner:
    """A runner that opens a source model for measurements on the given hardware."""

    source: Source
    hardware: Hardware
    watch: Watch

    @property
    def path(self) -> Path:
        return self.source.first.path

    @cached_property
    def binding(self) -> Binding:
        return bind(self.source)

    @contextmanager
    def opened(
        self, plan: Plan, files: ModelFiles | None = None, *, n_ctx: int | None = None
    ) -> Iterator[PopModel]:
        """Open the model or its converted `files`, and apply the plan's settings for full rows.

        `n_ctx` is the context length in tokens (default: the length that the windows need). Raises
        PopError or StoppedError.
        """
        n_ctx = n_ctx or 2 * (QualitySettings.n_context + QualitySettings.n_continuation)
        files = files or ModelFiles(self.path)
        with opened(files, self.hardware, self.watch, n_ctx=n_ctx, **row_options(plan)) as model:
            yield model

    @contextmanager
    def tried(
        self, plan: Plan, fitted: Fitted | None, *, n_ctx: int | None = None
    ) -> Iterator[PopModel]:
        """Open the model with the plan's temporary sidecar. Raises PopError or StoppedError."""
        with TemporaryDirectory(prefix=_PREFIX) as folder:
            sidecar = Path(folder) / _NAME
            write_trial(plan, self.source, sidecar, self.binding, fitted)
            with self.opened(plan, ModelFiles(self.path, sidecar), n_ctx=n_ctx) as model:
                yield model

    def require_room(self, plans: Sequence[Plan], kv_type: KvType) -> None:
        """Raise WriteError if the disk does not have enough space for the plans' sidecars."""
        with TemporaryDirectory(prefix=_PREFIX) as folder:
            for plan in plans:
                sizes = measure_sidecar(plan, self.path, kv_type)
                check_target(self.path, Path(folder) / _NAME, sizes, force=False)


@dataclass(frozen=True)
class FullModel:
    """The full model's scores on the held-out text and on look-ups, computed on first use.

    The scores are computed with the plan's full rows. Computing them may raise PopError or
    StoppedError.
    """

    runner: TrialRunner
    plan: Plan

    def deep_share(self, rule: DeepRows) -> float:
        """Return the fraction of the held-out text's tokens that `rule` selects."""
        if rule is DeepRows.NONE:
            return 0.0
        with self.runner.opened(self.plan) as model:
            texts = [np.asarray(part) for part in tokenize(model, shipped_text())]
            shares = [find_deep_rows(model.engine.context, part, rule).mean() for part in texts]
            return float(np.mean(shares))

    @cached_property
    def reference(self) -> QualityReference:
        self.runner.watch.on_note("Measuring the full model on held-out text")
        with self.runner.opened(self.plan) as model:
            tokens = tokenize(model, shipped_text())
            advance = self.runner.watch.stage("Running the full model")
            return read_reference(model, tokens, QualitySettings(N_WINDOWS), advance)

    @cached_property
    def lookups(self) -> LookupReference:
        with self.runner.opened(self.plan) as model:
            advance = self.runner.watch.stage("Running look-ups on the full model")
            return LookupReference.read(model, LookupSettings(N_DOCUMENTS), advance)
