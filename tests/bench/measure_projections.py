"""Time to first token with fitted and wide projections against own ones. Not a test.

    python tests/bench/measure_projections.py MODEL.gguf [--skip 1/3] [--prompts 512,2048] [--cpu N]

Converts the model four times (2,048 tokens to fit on: how well a projection fits does not change
what it costs) and opens all of them in this process, with one thread. In each round every one runs
once, in an order that rotates; ratios are taken within the round, the first round only warms up.
The row counters must agree. On a busy machine take `--clock cpu`. Prints Markdown.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.measure.speed import Run, Spread, random_prompt, run, spread

POP_LOCAL = Path(sys.executable).with_name("pop-local")
FIT = ("--tokens", "2048", "--threads", "1", "--force", "--projection")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def converted(model: Path, skip: str, folder: Path) -> dict[str, PopModel]:
    """Own, fitted, fitted as a sidecar, and a wide fit."""
    own, fitted, sidecar, wide = (
        folder / f"{name}.gguf" for name in ("own", "fitted", "sidecar", "wide")
    )
    for command in (
        [str(own), "--projection", "own"],
        [str(fitted), *FIT, "fitted"],
        [str(sidecar), "--sidecar", *FIT, "fitted"],
        [str(wide), "--sidecar", *FIT, "wide"],
    ):
        subprocess.run([POP_LOCAL, "convert", str(model), *command, "--skip", skip], check=True)
    opened = partial(PopModel, n_ctx=8192, n_threads=1, n_gpu_layers=0)
    return {
        "own": opened(own),
        "fitted": opened(fitted),
        "fitted, sidecar": opened(model, sidecar=sidecar),
        "wide, sidecar": opened(model, sidecar=wide),
    }


def measure(
    models: dict[str, PopModel], n_prompt: int, rounds: int, clock: Callable[[], float]
) -> dict[str, list[Run]]:
    tokens = random_prompt(models["own"], n_prompt)
    runs: dict[str, list[Run]] = {name: [] for name in models}
    for number in range(rounds + 1):
        names = list(models)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            done = run(models[name], Mode.CONTEXT, tokens, 1, clock)
            if number > 0:
                runs[name].append(done)
    return runs


def ratio(above: list[Run], below: list[Run]) -> Spread:
    return spread(a.ttft_s / b.ttft_s for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--skip", default="1/3")
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu", type=int, help="pin to this CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    print("| prompt | projections | pruned | TTFT s | against own |\n|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        models = converted(options.model, options.skip, Path(folder))
        for n_prompt in map(int, options.prompts.split(",")):
            runs = measure(models, n_prompt, options.rounds, CLOCKS[options.clock])
            if len({one.counters for done in runs.values() for one in done}) != 1:
                raise SystemExit("the row counters differ")
            for name, done in runs.items():
                ttft, against = spread(one.ttft_s for one in done), ratio(done, runs["own"])
                print(
                    f"| {n_prompt} | {name} | {done[0].counters.n_context} | {ttft.median:.3f}"
                    f" | {against.median:.3f} ({against.min:.3f}-{against.max:.3f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
