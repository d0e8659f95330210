"""A model's table of docs/quality.md: what each depth loses, and how fast it reads. Not a test.

    python tests/bench/measure_table.py MODEL.gguf --fits 18:fitted,16:wide,14:attention
        --out FOLDER [--prompts 512,2048] [--repeat 3] [--windows 16] [--texts FILE ...] [--cpu N]

All are fitted in one pass over convert's text; then each is `pop-local eval` and `pop-local bench`
of its sidecar, with one thread. FOLDER keeps sidecars and JSON, so that a second call measures only
what is missing. Of each of `--texts`, eight windows by themselves. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from converter.plan import make_plan
from converter.shape import source_shape
from converter.sidecar import write_sidecar
from converter.source import read_source
from pop_local.calibration.job import Follow, calibrate
from pop_local.calibration.loaded import LoadedModel
from pop_local.calibration.options import FitOptions
from pop_local.commands.options import ProjectionName
from pop_local.ui.watch import terminal_watch

POP_LOCAL = (sys.executable, "-m", "pop_local")
Recipe = tuple[int, str]  # boundary, kind of fit
HEADS = ("skipped", "limit", "KL", "first token", "PPL ratio", "copy", "facts, of full")


def fit(model: Path, recipes: list[Recipe], folder: Path) -> dict[Recipe, Path]:
    """The sidecar of each boundary and kind; those that are missing are fitted."""
    sidecars = {each: folder / f"{model.stem}.{'.'.join(map(str, each))}.gguf" for each in recipes}
    if missing := [recipe for recipe, path in sidecars.items() if not path.exists()]:
        source = read_source(model)
        shape = source_shape(source)
        plans = [make_plan(shape, boundary=b, projection=kind) for b, kind in missing]
        with terminal_watch() as watch, LoadedModel(model, n_threads=1, n_gpu_layers=0) as loaded:
            watch.stage("Sampling and fitting")
            follow = Follow(watch.on_progress, watch.on_progress, watch.should_stop)
            done = calibrate(plans, loaded, source, FitOptions(), follow)
        for plan, fitted in zip(plans, done.fitted, strict=True):
            write_sidecar(plan, model, sidecars[plan.boundary, plan.projection], fitted=fitted)
    return sidecars


def asked(kept: Path, *command: object) -> dict[str, Any]:
    """What a command printed as JSON, kept in a file."""
    if not kept.exists():
        words = [*POP_LOCAL, *map(str, command), "--threads", "1", "--json"]
        kept.write_text(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def with_se(found: dict[str, Any], name: str, digits: int) -> str:
    se = found["kl_se" if name == "kl_mean" else f"{name}_se"]
    return f"{found[name]:.{digits}f} ± {se:.{digits}f}"


def quality_cells(found: dict[str, Any]) -> list[str]:
    [recall] = found["recall"]
    return [
        f"{found['speedup_limit']:.2f}x",
        with_se(found, "kl_mean", 4),
        with_se(found, "kl_first", 3),
        with_se(found, "ppl_ratio", 3),
        with_se(found, "copy_ppl_ratio", 3),
        f"{recall['exact_pruned']:.0%} of {recall['exact_full']:.0%}",
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
    recipes = [(int(boundary), ProjectionName(kind).kind) for boundary, kind in fits]
    prompts = [int(each) for each in options.prompts.split(",") if each]
    sidecars = fit(options.model, recipes, options.out)
    heads = (*HEADS, *(text.stem for text in options.texts), *(f"{n:,} tokens" for n in prompts))
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for (_, kind), sidecar in sidecars.items():
        of = (options.model, "--pop", sidecar)
        found = asked(
            sidecar.with_suffix(".quality.json"), "eval", *of, "--windows", options.windows
        )
        cells = [f"{found['n_skipped']}, {kind}", *quality_cells(found)]
        for text in options.texts:
            kept = sidecar.with_suffix(f".{text.stem}.json")
            of_text = asked(kept, "eval", *of, "--text", text, "--windows", 8, "--recall", 0)
            cells.append(f"{with_se(of_text, 'kl_mean', 4)}, {with_se(of_text, 'ppl_ratio', 3)}")
        for n in prompts:
            kept = sidecar.with_suffix(f".{n}.json")
            timed = asked(kept, "bench", *of, "--prompt", n, "--repeat", options.repeat)
            [run] = timed["rows"]
            ratio = run["speedup"]
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
