"""Measure a sidecar again and write its rule and figures into its keys. Not a test.

    python tests/bench/remeasure_sidecar.py MODEL SIDECAR [--deep-rows names] [--lookups 200]

Replaces SIDECAR, whose tensors stay. Prints the figures as `pop-local eval --json` does.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.format import Budget, DeepRows
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.rewrite import Fitted
from pop_converter.popfile.sidecar import fitted_tensors, read_sidecar, write_sidecar
from pop_local.measure.budget import BUDGETS, is_inside, keeps_lookups
from pop_local.measure.quality import QualitySettings
from pop_local.ui.tables import print_json
from pop_local.ui.views.eval import evaluation_json
from pop_local.ui.watch import stoppable_watch
from pop_local.workflows.eval import EvaluateOptions, Evaluation, evaluate
from pop_local.workflows.hardware import Hardware
from pop_local.workflows.measuring import measured


def remeasure(model: Path, sidecar: Path, options: EvaluateOptions) -> Evaluation:
    """Measure with the options' deep rows, rewrite the sidecar's keys, and return the figures."""
    source = read_source(model)
    meta = read_sidecar(sidecar, source)
    assert meta.calibration is not None and options.deep_rows is not None
    with stoppable_watch() as watch:
        hardware = Hardware(n_threads=1)
        found = evaluate(model, options, sidecar=sidecar, hardware=hardware, watch=watch)
    plan = make_plan(
        source_shape(source),
        boundary=meta.boundary,
        sink_tokens=meta.sink_tokens,
        tail_tokens=meta.tail_tokens,
        min_prompt=meta.min_prompt,
        projection=meta.projection,
        deep_rows=options.deep_rows,
    )
    tensors = tuple(fitted_tensors(sidecar).values())
    fitted = Fitted(meta.calibration, tensors, meta.projection)
    figures = measured(found.quality, found.lookups)
    plan = replace(plan, budget=strictest(found))
    write_sidecar(plan, model, sidecar, fitted=fitted, examine=lambda _: figures, force=True)
    return found


def strictest(found: Evaluation) -> Budget | None:
    """Return the strictest budget that the figures are within, or None."""
    assert found.lookups is not None
    for budget in BUDGETS.values():
        if is_inside(budget, found.quality) and keeps_lookups(budget, found.lookups):
            return budget
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("sidecar", type=Path)
    parser.add_argument("--deep-rows", type=DeepRows, default=DeepRows.NAMES)
    parser.add_argument("--lookups", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16)
    given = parser.parse_args()
    options = EvaluateOptions(
        settings=QualitySettings(n_windows=given.windows),
        deep_rows=given.deep_rows,
        n_lookups=given.lookups,
    )
    print_json(evaluation_json(remeasure(given.model, given.sidecar, options)))


if __name__ == "__main__":
    main()
