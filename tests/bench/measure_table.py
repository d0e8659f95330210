"""A model's table of docs/quality.md: what each depth loses, and how fast it reads. Not a test.

    python tests/bench/measure_table.py MODEL.gguf --boundaries 18,16,14 --out FOLDER
        [--projection wide] [--prompts 512,2048] [--repeat 3] [--windows 16] [--cpu N]

All depths are fitted in one pass over convert's text; then each is `pop-local eval` and
`pop-local bench` of its sidecar, with one thread. FOLDER keeps sidecars and JSON, so that a second
call measures only what is missing. Prints Markdown.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from converter.format import FITTED, WIDE
from converter.plan import Plan, make_plan
from converter.shape import source_shape
from converter.source import read_source
from pop_local.calibration.options import FitOptions
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.fits import measure_fits
from pop_local.workflows.options import Hardware

POP_LOCAL = (sys.executable, "-m", "pop_local")
HEADS = ("skipped", "limit", "KL", "first token", "PPL ratio", "copy", "facts, of full")


def fit(model: Path, boundaries: list[int], kind: str, folder: Path) -> dict[int, Path]:
    """The sidecar of each depth; those that are missing are fitted."""
    sidecars = {each: folder / f"{model.stem}.{kind}.{each}.gguf" for each in boundaries}
    missing = [boundary for boundary, path in sidecars.items() if not path.exists()]
    if missing:
        source = read_source(model)
        plans = [
            make_plan(source_shape(source), boundary=boundary, projection=kind)
            for boundary in missing
        ]

        def keep(plan: Plan, made: Path) -> None:
            shutil.copy(made, sidecars[plan.boundary])

        with terminal_watch() as watch:
            measure_fits(plans, source, FitOptions(projection=kind), Hardware(1, 0), watch, keep)
    return sidecars


def asked(kept: Path, *command: object) -> dict[str, Any]:
    """What a command printed as JSON, kept in a file."""
    if not kept.exists():
        words = [*POP_LOCAL, *map(str, command), "--threads", "1", "--json"]
        kept.write_text(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def with_se(found: dict[str, Any], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f} ± {found[f'{name}_se']:.{digits}f}"


def quality_cells(found: dict[str, Any]) -> list[str]:
    [recall] = found["recall"]
    return [
        f"{found['speedup_limit']:.2f}x",
        f"{found['kl_mean']:.4f} ± {found['kl_se']:.4f}",
        with_se(found, "kl_first", 3),
        with_se(found, "ppl_ratio", 3),
        with_se(found, "copy_ppl_ratio", 3),
        f"{recall['exact_pruned']:.0%} of {recall['exact_full']:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundaries", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--projection", choices=[FITTED, "wide"], default=FITTED)
    parser.add_argument("--prompts", default="512,2048", help="empty: no times")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--cpu", type=int, help="pin to this CPU")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    options.out.mkdir(parents=True, exist_ok=True)
    kind = WIDE if options.projection == "wide" else FITTED
    boundaries = [int(each) for each in options.boundaries.split(",")]
    prompts = [int(each) for each in options.prompts.split(",") if each]
    sidecars = fit(options.model, boundaries, kind, options.out)
    heads = (*HEADS, *(f"{n:,} tokens" for n in prompts))
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for sidecar in sidecars.values():
        of = (options.model, "--pop", sidecar)
        found = asked(
            sidecar.with_suffix(".quality.json"), "eval", *of, "--windows", options.windows
        )
        cells = [f"{found['n_skipped']}, {options.projection}", *quality_cells(found)]
        for n in prompts:
            kept = sidecar.with_suffix(f".{n}.json")
            timed = asked(kept, "bench", *of, "--prompt", n, "--repeat", options.repeat)
            [run] = timed["rows"]
            ratio = run["speedup"]
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
