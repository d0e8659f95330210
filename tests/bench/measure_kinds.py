"""What a fit on one kind of text loses on each other kind: a matrix. Not a test.

    python tests/bench/measure_kinds.py MODEL.gguf --boundary 13 --out FOLDER
        --fit NAME=FILE,... --fit NAME= ... --held NAME=FILE ... [--tokens 24576] [--windows 8]

`--fit`: a row, fitted by `convert` on those files, on its own text where there are none. `--held`:
a column, measured as `eval --recall 0` does; the full model reads it once for all rows. FOLDER
keeps sidecars and figures: a second call makes only what is missing. Prints the rows as JSON,
where a cell is KL, its standard error, PPL ratio, its standard error, copy PPL ratio.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.plan import make_plan
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.job import Follow, calibrate
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.options import FitOptions
from pop_local.engine.model import PopModel
from pop_local.measure.forced import Pruning
from pop_local.measure.heldout import given_text, tokenize
from pop_local.measure.quality import QualitySettings, Reference, measure_against, read_reference
from pop_local.ui.views.quality import figures
from pop_local.ui.watch import terminal_watch

WIDE = Projection.WIDE


def named(option: str) -> tuple[str, list[Path]]:
    """NAME=FILE,... as a name and its files."""
    name, _, files = option.partition("=")
    return name, [Path(file) for file in files.split(",") if file]


def fit(name: str, texts: list[Path], options: argparse.Namespace) -> Path:
    """The sidecar of a row, fitted as `convert` does."""
    sidecar: Path = options.out / f"{options.model.stem}.{options.boundary}.{name}.gguf"
    if not sidecar.exists():
        source = read_source(options.model)
        plan = make_plan(source_shape(source), boundary=options.boundary, projection=WIDE)
        how = FitOptions(options.tokens, tuple(texts), projection=WIDE)
        with LoadedModel(options.model, n_threads=1) as model, terminal_watch() as watch:
            follow = Follow(watch.stage("Sampling"), watch.stage("Fitting"), watch.should_stop)
            [fitted] = calibrate([plan], model, source, how, follow).fitted
        write_sidecar(plan, options.model, sidecar, fitted=fitted)
    return sidecar


def reference(options: argparse.Namespace, text: Path, sidecar: Path) -> Reference:
    """The full model on a column."""
    settings = QualitySettings(options.windows, n_draws=1)
    with PopModel(options.model, sidecar=sidecar, n_threads=1, n_ctx=2048) as model:
        tokens = tokenize(model, given_text(text))
        return read_reference(model, tokens, settings, lambda done, total: None)


def measure(options: argparse.Namespace, full: Reference, sidecar: Path) -> dict[str, Any]:
    """A cell, as `eval --json` names its figures."""
    with PopModel(options.model, sidecar=sidecar, n_threads=1, n_ctx=2048) as model:
        pruning = Pruning(options.boundary)
        [quality] = measure_against(full, model, [pruning], lambda done, total: None)
    return figures(quality)


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
    sidecars = {name: fit(name, texts, options) for name, texts in options.fit}
    rows: dict[str, Any] = {name: {"fitted": name} for name in sidecars}
    for column, [text] in options.held:
        kept = {row: path.with_suffix(f".{column}.json") for row, path in sidecars.items()}
        if missing := [row for row, path in kept.items() if not path.exists()]:
            full = reference(options, text, sidecars[missing[0]])
            for row in missing:
                kept[row].write_text(json.dumps(measure(options, full, sidecars[row])))
                print(column, row, kept[row].read_text(), file=sys.stderr)
        for row, path in kept.items():
            found = json.loads(path.read_text())
            names = ("kl_mean", "kl_se", "ppl_ratio", "ppl_ratio_se", "copy_ppl_ratio")
            rows[row][column] = [round(found[name], 4) for name in names]
    for found in rows.values():
        print(json.dumps(found))


if __name__ == "__main__":
    main()
