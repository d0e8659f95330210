"""Measure the loss and the speed of each depth of a model. Not a test.

    python tests/bench/measure_table.py MODEL.gguf --fits 18:fitted,16:fitted-wide
        --out FOLDER [--prompts 512,2048] [--repeat 3] [--windows 16] [--texts FILE ...] [--cpu N]

All depths are fitted in one pass over convert's text, and measured as by `pop-local eval`. The full
model reads the text once for all, and its predictions are kept (2 * windows * 128 * n_vocab bytes).
Then `pop-local eval` runs on each of `--texts`, with eight windows, and `pop-local bench`. All run
on one CPU thread. FOLDER keeps sidecars and JSON: a second call measures only the missing ones.
Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pop_converter.architecture.shape import source_shape
from pop_converter.gguf.source import read_source
from pop_converter.popfile.pruning_plan import Plan, make_plan
from pop_converter.popfile.sidecar import write_sidecar
from pop_converter.projection import Projection
from pop_local.calibration.activations import loaded
from pop_local.calibration.fit_options import FitOptions
from pop_local.calibration.job import calibrate
from pop_local.engine.llama.graph_macs import GraphMacs
from pop_local.measure.forced import Pruning
from pop_local.measure.quality import measure_against
from pop_local.models.model_files import ModelFiles
from pop_local.ui.views.eval import figures
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.conversion import trial_runner
from pop_local.workflows.conversion.trial_runner import FullModel, TrialRunner
from pop_local.workflows.hardware import Hardware

POP_LOCAL = (sys.executable, "-m", "pop_local")
ONE_THREAD = Hardware(n_threads=1, n_gpu_layers=0)
Recipe = tuple[int, Projection]  # boundary, kind of fit
HEADS = ("skipped", "limit", "KL", "first token", "PPL ratio", "copy", "look-ups lost")


def fit(model: Path, recipes: list[Recipe], folder: Path) -> dict[Recipe, Path]:
    """Return the sidecar of each boundary and kind, after fitting the missing ones."""
    sidecars = {each: folder / f"{model.stem}.{'.'.join(map(str, each))}.gguf" for each in recipes}
    if missing := [recipe for recipe, path in sidecars.items() if not path.exists()]:
        source = read_source(model)
        shape = source_shape(source)
        plans = [make_plan(shape, boundary=b, projection=kind) for b, kind in missing]
        with terminal_watch() as watch, loaded(model, **vars(ONE_THREAD)) as context:
            fits = calibrate(plans, context, source, FitOptions(), watch)
        for plan, fitted in zip(plans, fits, strict=True):
            write_sidecar(plan, model, sidecars[plan.boundary, plan.projection], fitted=fitted)
    return sidecars


def measure(model: Path, sidecars: dict[Recipe, Path], n_windows: int) -> None:
    """Return the losses of each sidecar, stored next to it, after measuring the missing ones."""
    shape, macs = source_shape(read_source(model)), GraphMacs(model)
    plans = {
        path: make_plan(shape, boundary=b, projection=k, macs=macs)
        for (b, k), path in sidecars.items()
    }
    with terminal_watch() as watch:
        some_plan = next(iter(plans.values()))
        bench = TrialRunner(read_source(model), ONE_THREAD, watch)
        trial_runner.N_WINDOWS = n_windows
        full = FullModel(bench, some_plan)
        for sidecar, plan in plans.items():
            kept = sidecar.with_suffix(".quality.json")
            if not kept.exists():
                kept.write_text(json.dumps(measure_one(full, plan, sidecar), indent=2))


def measure_one(full: FullModel, plan: Plan, sidecar: Path) -> dict[str, Any]:
    """Return the losses of one sidecar, against the full model's predictions."""
    pruning = Pruning(plan.boundary)
    reference, asked = full.reference, full.lookups
    runner = full.runner
    with runner.opened(plan, ModelFiles(runner.path, sidecar)) as model:
        advance = runner.watch.stage(f"Measuring boundary {plan.boundary}")
        quality = measure_against(reference, model, pruning, advance)
        answers = asked.ask(model, pruning, runner.watch.stage("Running look-ups"))
    return {
        "n_skipped": plan.n_skipped,
        "speedup_limit": plan.speedup_limit,
        **figures(quality),
        "lookups": figures(asked.compare(answers)),
    }


def asked(kept: Path, *command: object) -> dict[str, Any]:
    """Return a command's JSON output, cached in a file."""
    if not kept.exists():
        words = [*POP_LOCAL, *map(str, command), "--threads", "1", "--gpu-layers", "0", "--json"]
        kept.write_text(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def with_se(found: dict[str, Any], name: str, digits: int) -> str:
    se = found["kl_se" if name == "kl_mean" else f"{name}_se"]
    return f"{found[name]:.{digits}f} ± {se:.{digits}f}"


def quality_cells(found: dict[str, Any]) -> list[str]:
    lookups = found["lookups"]
    return [
        f"{found['speedup_limit']:.2f}x",
        with_se(found, "kl_mean", 4),
        with_se(found, "kl_first", 3),
        with_se(found, "ppl_ratio", 3),
        with_se(found, "copy_ppl_ratio", 3),
        f"{lookups['lost']} of {lookups['full']}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--fits", required=True, help="BOUNDARY:KIND,...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", default="512,2048", help="empty: no times")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--cpu", type=int, help="pin to this CPU")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    options.out.mkdir(parents=True, exist_ok=True)
    fits = [each.split(":") for each in options.fits.split(",")]
    recipes = [(int(boundary), Projection(kind)) for boundary, kind in fits]
    prompts = [int(each) for each in options.prompts.split(",") if each]
    sidecars = fit(options.model, recipes, options.out)
    measure(options.model, sidecars, options.windows)
    heads = (*HEADS, *(text.stem for text in options.texts), *(f"{n:,} tokens" for n in prompts))
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for (_, kind), sidecar in sidecars.items():
        of = (options.model, "--sidecar", sidecar)
        found = json.loads(sidecar.with_suffix(".quality.json").read_text())
        cells = [f"{found['n_skipped']}, {kind}", *quality_cells(found)]
        for text in options.texts:
            kept = sidecar.with_suffix(f".{text.stem}.json")
            of_text = asked(kept, "eval", *of, "--text", text, "--windows", 8, "--lookups", 0)
            cells.append(f"{with_se(of_text, 'kl_mean', 4)}, {with_se(of_text, 'ppl_ratio', 3)}")
        for n in prompts:
            kept = sidecar.with_suffix(f".{n}.json")
            timed = asked(kept, "bench", *of, "--prompt", n, "--repeat", options.repeat)
            [run] = timed["rows"]
            ratio, full, pruned = run["speedup"], run["full_ttft_s"], run["pop_ttft_s"]
            cells.append(
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}),"
                f" {full['median']:.3g} to {pruned['median']:.3g} s"
            )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
