"""Two environments, prefill by prefill: speed of the second over the first. Not a test.

python tests/bench/measure_states.py BEFORE/bin/python AFTER/bin/python MODEL
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

# In either environment: a line "TOKENS PRUNED" is answered by seconds.
_CHILD = """
import sys, time
from pop_local import PopModel
from pop_local.measure.speed import random_prompt
model = PopModel.open(sys.argv[1], n_ctx=int(sys.argv[2]) + 64, n_threads=1)
prompts = {}
print("ready", flush=True)
for line in sys.stdin:
    n, pruned = map(int, line.split())
    prompt = prompts.setdefault(n, random_prompt(model, n))
    model.pruning = bool(pruned)
    model.cache.clear()
    start = time.perf_counter()
    model.read(prompt)
    print(time.perf_counter() - start, flush=True)
"""


class Child:
    def __init__(self, python: Path, model: Path, n_most: int) -> None:
        command = [str(python.absolute()), "-c", _CHILD, str(model.resolve()), str(n_most)]
        pipe = subprocess.PIPE
        # Not in the project's folder, whose own pop_local would be imported.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd="/")
        self._line()

    def seconds(self, n: int, *, pruned: bool) -> float:
        assert self._process.stdin
        self._process.stdin.write(f"{n} {pruned:d}\n")
        self._process.stdin.flush()
        return float(self._line())

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
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    lengths = [int(n) for n in options.prompts.split(",")]
    before, after = (
        Child(python, options.model, max(lengths)) for python in (options.before, options.after)
    )
    for n in lengths:
        for pruned in (True, False):
            ratios = []
            for turn in range(options.pairs + 1):
                order = (before, after) if turn % 2 else (after, before)
                took = {child: child.seconds(n, pruned=pruned) for child in order}
                ratios.append(took[before] / took[after])
            low, middle, high = statistics.quantiles(ratios[1:], n=4)
            row = {"n_prompt": n, "pruned": pruned, "median": middle, "quartiles": [low, high]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
