"""Measure the loss of a fit on each kind of text, on each other kind. Not a test.

    python tests/bench/measure_kinds.py MODEL.gguf --out FOLDER --held NAME=FILE ...
        [--boundary 13 --fit NAME=FILE,... --fit NAME= ... --tokens 24576]
        [--sidecar NAME=FILE ...] [--windows 8]

`--fit` adds a row, fitted by `convert` on those files, or on its own text without files.
`--sidecar` adds a row for an existing sidecar. `--held` adds a column, measured as by `eval
--lookups 0`; the full model reads it once for all rows (2 * windows * 128 * n_vocab bytes each).
FOLDER keeps sidecars and figures: a second call computes only the missing ones. Prints rows as
JSON: KL, PPL ratio and copy PPL ratio with their errors, and the share of deep rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.sidecar import read_sidecar, write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import calibrate
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate, exp_mean, mean, ratio
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import given_text, tokenize
from pop_local.measure.quality import (
    QualityReference,
    QualitySettings,
    Scores,
    measure_against,
    read_reference,
)
from pop_local.ui.watch import terminal_watch
from support.calls import first_of

WIDE = Projection.WIDE


def named(option: str) -> tuple[str, list[Path]]:
    """Split NAME=FILE,... into a name and its files."""
    name, _, files = option.partition("=")
    return name, [Path(file) for file in files.split(",") if file]


def fit(name: str, texts: list[Path], options: argparse.Namespace) -> Path:
    """Return a row's sidecar, fitted as by `convert`."""
    sidecar: Path = options.out / f"{options.model.stem}.{options.boundary}.{name}.gguf"
    if not sidecar.exists():
        source = read_source(options.model)
        plan = make_plan(source_shape(source), boundary=options.boundary, projection=WIDE)
        how = FitOptions(options.tokens, tuple(texts), projection=WIDE)
        with loaded(options.model, n_threads=1) as context, terminal_watch() as watch:
            [fitted] = calibrate([plan], context, source, how, watch)
        write_sidecar(plan, options.model, sidecar, fitted=fitted)
    return sidecar


def measure(
    options: argparse.Namespace, sidecar: Path, references: dict[str, QualityReference]
) -> dict[str, Any]:
    """Return a row's losses and shares of deep rows, by window; `references` are read once."""
    settings = QualitySettings(options.windows, n_draws=1)
    boundary = read_sidecar(sidecar, read_source(options.model)).boundary
    row: dict[str, Any] = {}
    with PopModel(
        EngineOptions.of(options.model, sidecar=sidecar, n_threads=1, n_ctx=2048)
    ) as model:
        rule = first_of(model).rule
        n_prunable = settings.n_context - rule.sink_tokens - rule.tail_tokens
        for column, [text] in options.held:
            if column not in references:
                tokens = tokenize(model, given_text(text))
                references[column] = read_reference(model, tokens, settings, _silent)
            full, pruning = references[column], Pruning(boundary)
            scores: list[Scores] = []
            measure_against(full, model, pruning, _silent, scores)
            row[column] = {
                "kl": [float(each.divergence.kl.mean()) for each in scores],
                "nll": [float((each.pruned.nll - each.full.nll).mean()) for each in scores],
                "copy": [
                    float((each.copy_pruned.nll - each.copy_full.nll).mean()) for each in scores
                ],
                "deep": [1 - each.n_pruned / n_prunable for each in scores],
            }
    return row


def cells(row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return a row for docs/results: each column's KL, PPL ratio (`_ppl`), copy PPL ratio
    (`_copy`) and share of deep rows (`_deep`).

    `of_first`: all windows' KL over the same windows' KL in the first row.
    """
    found: dict[str, Any] = {}
    for column, each in row.items():
        found |= {
            column: _figures(mean(np.array(each["kl"]))),
            f"{column}_ppl": _figures(exp_mean(np.array(each["nll"]))),
            f"{column}_copy": _figures(exp_mean(np.array(each["copy"]))),
            f"{column}_deep": round(sum(each["deep"]) / len(each["deep"]), 3),
        }
    every, of = ([x for each in some.values() for x in each["kl"]] for some in (row, first))
    found["of_first"] = _figures(ratio(np.array(every), np.array(of)))
    return found | {"worst": max(found[column][0] for column in row)}


def _figures(estimate: Estimate) -> list[float]:
    return [round(x, 4) for x in (estimate.value, estimate.se) if x is not None]


def _silent(done: int, total: int) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fit", type=named, action="append", default=[])
    parser.add_argument("--sidecar", type=named, action="append", default=[])
    parser.add_argument("--held", type=named, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    if options.fit and options.boundary is None:
        parser.error("--fit needs --boundary")
    options.out.mkdir(parents=True, exist_ok=True)
    references: dict[str, QualityReference] = {}
    rows: list[dict[str, Any]] = []
    sidecars = [(name, fit(name, texts, options)) for name, texts in options.fit]
    sidecars += [(name, sidecar) for name, [sidecar] in options.sidecar]
    for name, sidecar in sidecars:
        kept = options.out / f"{options.model.stem}.{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measure(options, sidecar, references)))
        rows.append(json.loads(kept.read_text()))
        print(json.dumps({"fitted": name, **cells(rows[-1], rows[0])}), flush=True)


if __name__ == "__main__":
    main()
