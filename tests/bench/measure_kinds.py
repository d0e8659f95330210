"""Measure the loss of a fit on each kind of text, on each other kind. Not a test.

    python tests/bench/measure_kinds.py MODEL.gguf --boundary 13 --out FOLDER
        --fit NAME=FILE,... --fit NAME= ... --held NAME=FILE ... [--tokens 24576] [--windows 8]

`--fit` adds a row, fitted by `convert` on those files, or on its own text without files. `--held`
adds a column, measured as by `eval --lookups 0`; the full model reads it once for all rows (2 *
windows * 128 * n_vocab bytes each). FOLDER keeps sidecars and figures: a second call computes only
the missing ones. Prints rows as JSON, figures with their errors.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import make_plan
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import Callbacks, calibrate
from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.model import PopModel
from pop_local.measure.estimate import Estimate, exp_mean, mean, ratio
from pop_local.measure.forced import Pruning, forced
from pop_local.measure.heldout import given_text, tokenize
from pop_local.measure.quality import QualityReference, QualitySettings, read_reference, score
from pop_local.ui.watch import terminal_watch

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
            watch.stage(f"Sampling and fitting {name}")
            follow = Callbacks(watch.on_progress, watch.on_progress, watch.should_stop)
            [fitted] = calibrate([plan], context, source, how, follow).fitted
        write_sidecar(plan, options.model, sidecar, fitted=fitted)
    return sidecar


def measure(
    options: argparse.Namespace, sidecar: Path, references: dict[str, QualityReference]
) -> dict[str, Any]:
    """Return a row's KL and added NLL, by window; `references` are read once."""
    settings = QualitySettings(options.windows, n_draws=1)
    row: dict[str, Any] = {}
    with PopModel(
        EngineOptions.of(options.model, sidecar=sidecar, n_threads=1, n_ctx=2048)
    ) as model:
        for column, [text] in options.held:
            if column not in references:
                tokens = tokenize(model, given_text(text))
                references[column] = read_reference(model, tokens, settings, _silent)
            full, pruning = references[column], Pruning(options.boundary)
            with forced(model) as reader:
                [scores] = score(reader, full.windows, full.full, [pruning], lambda n: None)
            row[column] = {
                "kl": [float(each.divergence.kl.mean()) for each in scores],
                "nll": [float((each.pruned.nll - each.full.nll).mean()) for each in scores],
            }
    return row


def cells(row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return a row for docs/results: KL and PPL ratio (`_ppl`) of each column.

    `of_first`: all windows' KL over the same windows' KL in the first row.
    """
    found: dict[str, Any] = {}
    for column, each in row.items():
        kl, ppl = mean(np.array(each["kl"])), exp_mean(np.array(each["nll"]))
        found |= {column: _figures(kl), f"{column}_ppl": _figures(ppl)}
    every, of = ([x for each in some.values() for x in each["kl"]] for some in (row, first))
    found["of_first"] = _figures(ratio(np.array(every), np.array(of)))
    return found | {"worst": max(found[column][0] for column in row)}


def _figures(estimate: Estimate) -> list[float]:
    return [round(x, 4) for x in (estimate.value, estimate.se) if x is not None]


def _silent(done: int, total: int) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fit", type=named, action="append", required=True)
    parser.add_argument("--held", type=named, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    references: dict[str, QualityReference] = {}
    rows: list[dict[str, Any]] = []
    for name, texts in options.fit:
        sidecar = fit(name, texts, options)
        kept = sidecar.with_suffix(".json")
        if not kept.exists():
            kept.write_text(json.dumps(measure(options, sidecar, references)))
        rows.append(json.loads(kept.read_text()))
        print(json.dumps({"fitted": name, **cells(rows[-1], rows[0])}), flush=True)


if __name__ == "__main__":
    main()
