"""Tables of docs/quality.md: depths and ablations, from `pop-local eval --json`. Not a test.

    python tests/bench/measure_quality.py MODEL.gguf [--text FILE] [--windows 32] [--out FOLDER]

Each row is one run of the command, but for the depths of a sweep.
FOLDER keeps its JSON, so that a second call measures only what is missing. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POP_LOCAL = Path(sys.executable).with_name("pop-local")
DEPTHS = "1/6,1/4,1/3,1/2"
ABLATED = "1/3"


@dataclass(frozen=True)
class Row:
    """One run of eval; `is_fitted_file` for one on the file that convert makes by default."""

    name: str
    options: tuple[str, ...] = ()
    is_fitted_file: bool = False


SWEEPS = (
    Row("own", ("--sweep", DEPTHS)),
    Row("fitted", ("--sweep", DEPTHS, "--fit")),
)
REFIT = ("--skip", ABLATED, "--fit")
ABLATIONS = (
    Row("as convert does it", (), True),
    Row("own projections", ("--skip", ABLATED)),
    Row("no boundary handling", ("--no-boundary",), True),
    Row("no sink", ("--sink", "0"), True),
    Row("tail of 1", ("--tail", "1"), True),
    Row("tail of 4", ("--tail", "4"), True),
    Row("tail of 16", ("--tail", "16"), True),
    Row("tail of 64", ("--tail", "64"), True),
    Row("tokens weighted alike", (*REFIT, "--weighting", "none")),
    Row("stored as F16", (*REFIT, "--kv-type", "f16")),
    Row("stored as Q4_0", (*REFIT, "--kv-type", "q4_0")),
    Row("2k tokens", (*REFIT, "--tokens", "2048")),
    Row("8k tokens", (*REFIT, "--tokens", "8192")),
    Row("32k tokens", (*REFIT, "--tokens", "32768")),
)


def evaluated(row: Row, model: Path, fitted: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The output of eval, kept in the folder of --out."""
    kept = Path(options.out, f"{model.stem}.{row.name.replace(' ', '-')}.{options.windows}.json")
    if not kept.exists():
        command = ["eval", str(fitted if row.is_fitted_file else model), "--json", "--recall", "0"]
        command += ["--windows", str(options.windows), *row.options]
        if options.text is not None:
            command += ["--text", str(options.text)]
        kept.write_text(pop_local(command, options))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def pop_local(command: list[str], options: argparse.Namespace) -> str:
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    print(f"pop-local {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run([POP_LOCAL, *command, *threads], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout


def table(title: str, rows: list[tuple[str, dict[str, Any]]]) -> None:
    heads = (title, "limit", "KL", "first-token KL", "PPL ratio", "copy PPL ratio", "random tokens")
    print(f"\n| {' | '.join(heads)} |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, found in rows:
        retention = found["induction_retention"]
        cells = (
            f"{found['speedup_limit']:.2f}x",
            f"{found['kl_mean']:.4f} ± {found['kl_se']:.4f}",
            with_se(found, "kl_first", 3),
            with_se(found, "ppl_ratio", 3),
            with_se(found, "copy_ppl_ratio", 3),
            "-" if retention is None else f"{retention:.0%}",
        )
        print(f"| {name} | {' | '.join(cells)} |")


def with_se(found: dict[str, Any], name: str, digits: int) -> str:
    return f"{found[name]:.{digits}f} ± {found[f'{name}_se']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="held-out text; default: eval's own")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="folder for the JSON of each row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.out = options.out or Path(scratch)
        options.out.mkdir(parents=True, exist_ok=True)
        fitted = options.out / f"{options.model.stem}.pop.gguf"
        if not fitted.exists():
            pop_local(["convert", str(options.model), str(fitted), "--skip", ABLATED], options)
        sweeps = [
            (f"{depth['n_skipped']} layers, {row.name}", depth)
            for row in SWEEPS
            for depth in evaluated(row, options.model, fitted, options)["rows"]
        ]
        ablations = [
            (row.name, evaluated(row, options.model, fitted, options)) for row in ABLATIONS
        ]
    shown = ablations[0][1]
    print(f"{options.model.stem}, {shown['n_windows']} windows of {shown['text']['name']}")
    table("skipped", sweeps)
    table(f"{shown['n_skipped']} layers skipped", ablations)


if __name__ == "__main__":
    main()
