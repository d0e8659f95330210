"""Measure the memory that a question about a document takes with each model. Not a test.

    python tests/bench/measure_memory.py MODEL [MODEL ...]

Prints one JSON object per model: `ram_bytes`, the largest resident memory of `pop-local run` on the
demo's document, which includes the pages of the model file.
"""

import argparse
import json
import resource
import subprocess
import sys

COMMAND = ["-m", "pop_local", "run"]
DOCUMENT = "pop_local/data/document.md"
QUESTION = "What rule was painted above the lamp-room door?"


def measure(model: str) -> dict[str, object]:
    """Run one question, and return the model's name and its memory. Raises CalledProcessError."""
    options = ["--threads", "1", "--ctx", "8192", "--max-tokens", "32"]
    asked = ["--file", DOCUMENT, QUESTION]
    command = [sys.executable, *COMMAND, model, *options, *asked]
    subprocess.run(command, check=True, stdout=sys.stderr)
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"model": model, "ram_bytes": kib * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    models = parser.parse_args().models
    if len(models) == 1:
        print(json.dumps(measure(models[0])))
        return
    # The system reports the largest of all children, so each model gets a process.
    for model in models:
        subprocess.run([sys.executable, __file__, model], check=True)


if __name__ == "__main__":
    main()
