"""Compare the speed and memory of two environments on the same tokens. Not a test.

    python tests/bench/measure_states.py BEFORE/bin/python AFTER/bin/python MODEL.gguf
        [--sidecar FILE] [--prompts 512,2048] [--pairs 16] [--threads 1]

Both environments use one sidecar (default: each environment's own). Prints a row of JSON for each
length and mode: the time of BEFORE divided by the time of AFTER.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pop_local.engine.model import PopModel
from pop_local.measure.speed import text_prompt

# Runs in either environment. Prints the time to open, then for each line "PRUNED TOKEN ..." the
# TTFT, the time per following token, and the peak memory so far.
_CHILD = """
import resource, sys, time
from pop_local import PopModel
from pop_local.engine.llama.backend import Mode
from pop_local.engine.prompt.prompt import Prompt
from pop_local.measure.speed import run
path, sidecar, n_ctx, n_threads = sys.argv[1], sys.argv[2] or None, *map(int, sys.argv[3:])
start = time.perf_counter()
model = PopModel.open(path, sidecar=sidecar, n_ctx=n_ctx, n_threads=n_threads)
open_s = time.perf_counter() - start
print(open_s, flush=True)
for line in sys.stdin:
    pruned, *tokens = map(int, line.split())
    ran = run(model, Mode.CONTEXT if pruned else Mode.OFF, Prompt(tokens))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(ran.ttft_s, 1 / ran.decode_tokens_per_s, peak, flush=True)
"""


class Child:
    def __init__(self, python: Path, options: argparse.Namespace, n_ctx: int) -> None:
        sidecar = str(options.sidecar.resolve()) if options.sidecar else ""
        command = [str(python.absolute()), "-c", _CHILD, str(options.model.resolve()), sidecar]
        command += [str(n_ctx), str(options.threads)]
        pipe = subprocess.PIPE
        # Not in the project's folder, whose own pop_local would be imported.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd="/")
        self.open_s, self.peak_bytes = float(self._line()), 0

    def seconds(self, tokens: Sequence[int], *, pruned: bool) -> tuple[float, float]:
        assert self._process.stdin
        self._process.stdin.write(f"{pruned:d} {' '.join(map(str, tokens))}\n")
        self._process.stdin.flush()
        ttft_s, token_s, peak_bytes = map(float, self._line().split())
        self.peak_bytes = int(peak_bytes)
        return ttft_s, token_s

    def _line(self) -> str:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit("a child ended, see above")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sidecar", type=Path)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    lengths = [int(n) for n in options.prompts.split(",")]
    with PopModel.open(options.model, n_ctx=1) as model:
        prompts = [text_prompt(model, n).tokens for n in lengths]
    before, after = (
        Child(python, options, max(lengths) + 64) for python in (options.before, options.after)
    )
    for n, tokens in zip(lengths, prompts, strict=True):
        for pruned in (True, False):
            ratios = []
            for turn in range(options.pairs + 1):
                order = (before, after) if turn % 2 else (after, before)
                took = {child: child.seconds(tokens, pruned=pruned) for child in order}
                pairs = zip(took[before], took[after], strict=True)
                ratios.append([one_s / other_s for one_s, other_s in pairs])
            row: dict[str, object] = {"n_prompt": n, "pruned": pruned}
            for what, each in zip(("ttft", "decode"), zip(*ratios[1:], strict=True), strict=True):
                low, middle, high = statistics.quantiles(each, n=4)
                row[what] = {"median": middle, "quartiles": [low, high]}
            print(json.dumps(row), flush=True)
    for name in ("open_s", "peak_bytes"):
        print(json.dumps({name: [getattr(child, name) for child in (before, after)]}))


if __name__ == "__main__":
    main()
