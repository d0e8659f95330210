"""Measure the speedup of fast reading on each kind of text. Not a test.

    python tests/bench/measure_kinds_speed.py MODEL.gguf --held NAME=FILE ... [--sidecar FILE]
        [--tokens 2048] [--rounds 3] [--clock cpu]

Each kind's prompt is read in full and pruned, in alternating rounds after a warm-up, on one thread.
`--clock cpu` takes the process's CPU time, which is comparable if other work runs. Prints one JSON
line for each kind: the share of deep rows, and the median, smallest and largest speedup.
"""

import argparse
import json
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import run, run_rounds, spread

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--held", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--sidecar", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    how = EngineOptions.of(
        options.model, sidecar=options.sidecar, n_threads=1, n_ctx=options.tokens + 64
    )
    with PopModel(how) as model:
        for kind in options.held:
            name, _, file = kind.partition("=")
            tokens = model.engine.context.vocabulary.tokenize(Path(file).read_text("utf-8"))
            prompt = Prompt(list(islice(cycle(tokens), options.tokens)))
            clock = CLOCKS[options.clock]
            full, pruned = run_rounds(
                [
                    partial(run, model, mode, prompt, n_decode=1, clock=clock)
                    for mode in (Mode.OFF, Mode.CONTEXT)
                ],
                options.rounds,
            )
            rows = pruned[0].read.counters
            row = {
                "kind": name,
                "deep": round(rows.n_deep / (rows.n_deep + rows.n_context), 3),
                "full_s": round(spread(each.ttft_s for each in full).median, 3),
                "pruned_s": round(spread(each.ttft_s for each in pruned).median, 3),
                "speedup": vars(
                    spread(a.ttft_s / b.ttft_s for a, b in zip(full, pruned, strict=True))
                ),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
