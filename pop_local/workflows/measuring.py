"""Open a model to measure it, and convert the results to the metrics stored in model files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import isnan
from pathlib import Path
from typing import Any

from pop_base.errors import PopError
from pop_base.progress import Watch
from pop_converter.popfile.format import Measured
from pop_converter.popfile.pruning_plan import Plan
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.engine.prefill.plan import Reuse
from pop_local.measure.lookups import Lookups
from pop_local.measure.quality import Quality
from pop_local.models.model_files import ModelFiles
from pop_local.workflows.hardware import Hardware


@contextmanager
def opened(
    files: ModelFiles, hardware: Hardware, watch: Watch, **options: Any
) -> Iterator[PopModel]:
    """Open a model that `watch.should_stop` can interrupt. `options`: see EngineOptions."""
    options |= {"reuse": Reuse.EXACT, "sidecar": files.sidecar}  # stale rows would add to the loss
    model = PopModel(EngineOptions.of(files.path, **vars(hardware), **options))
    with model, stopped_by(watch.should_stop):
        yield model


def not_converted(model: Path, cause: str, consequence: str = "") -> PopError:
    """Return the error for a model without pruning keys."""
    message = f"{model} has not been converted{consequence}"
    return PopError(message, "convert the model", cause=cause, model=model)


_ERRORS = {"kl_se": "kl_mean", "ppl_ratio_se": "ppl_ratio"}
_COUNTS = ("n", "full", "pruned", "lost", "gained")


def row_options(plan: Plan) -> dict[str, Any]:
    """Return the EngineOptions fields that select the plan's full rows."""
    names = ("sink_tokens", "tail_tokens", "deep_rows")
    return {name: getattr(plan, name) for name in names}


def stored_metrics(quality: Quality, lookups: Lookups | None = None) -> Measured:
    """Return the metrics to store in a converted file. Raises PopError if a metric is NaN."""
    names = {field.name for field in fields(Measured)} & {field.name for field in fields(Quality)}
    metrics = {name: getattr(quality, name).value for name in names}
    if any(map(isnan, metrics.values())):
        raise PopError("the model's predictions contain NaN values", "download the model again")
    metrics |= {error: getattr(quality, name).se or 0.0 for error, name in _ERRORS.items()}
    if lookups is None:
        return Measured(**metrics)
    lost = lookups.logprob_lost
    return Measured(
        **metrics,
        **{f"lookups_{name}": getattr(lookups, name) for name in _COUNTS},
        lookups_logprob_lost=lost.value,
        lookups_logprob_se=lost.se or 0.0,
    )
