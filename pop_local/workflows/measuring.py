"""A model opened to be measured, and the figures that a file stores of the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import isnan
from typing import Any

from pop_converter.base.errors import PopError
from pop_converter.popfile.format import Measured, Recalled
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.measure.quality import Quality
from pop_local.measure.recall import Recall
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.events import Watch
from pop_local.workflows.hardware import Hardware


@contextmanager
def opened(
    files: ModelFiles, hardware: Hardware, watch: Watch, **options: Any
) -> Iterator[PopModel]:
    """Open a model that the watch may stop while llama.cpp reads; `options` as for PopModel."""
    model = PopModel(files.path, sidecar=files.sidecar, **vars(hardware), **options)
    with model, stopped_by(watch.should_stop):
        yield model


def measured(quality: Quality) -> Measured:
    """The figures that a converted file stores. Raises PopError where one is no number."""
    estimates = {
        field.name: getattr(quality, field.name).value
        for field in fields(Measured)
        if field.name != "kl_se"
    }
    if any(map(isnan, estimates.values())):
        raise PopError("what the model predicts is no number", "download it again")
    return Measured(**estimates, kl_se=quality.kl_mean.se or 0.0)


def recalled(recall: Recall) -> Recalled:
    """How often facts were found, as a converted file stores it."""
    full, pruned, lost = recall.exact_full, recall.exact_pruned, recall.exact_lost
    return Recalled(recall.n_documents, full.value, pruned.value, lost.se or 0.0)
