"""Check that wheels alone can answer a pruned prompt; pytest does not run this file.

    python tests/smoke.py WHEELS MODEL.gguf

The fresh environment has no index, no user settings, and only its programs on PATH. MODEL is from
the catalog, whose sidecar is in the wheel, or a converted model. The exit status is 1 if a step
fails, if no token is pruned, or if it all takes a minute of processor time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "pop_local" / "data" / "document.md"
QUESTION = "What is this about?"
N_CHARS = 3000
LIMIT_S = 60


def main() -> None:
    wheels, model = (Path(given).resolve() for given in sys.argv[1:])
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        venv.create(home / "venv", with_pip=True)
        programs = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
        env = {"PATH": str(programs), "PIP_CONFIG_FILE": os.devnull}
        env |= dict.fromkeys(("HOME", "USERPROFILE", "TEMP"), scratch)
        env |= {name: value for name, value in os.environ.items() if name == "SYSTEMROOT"}

        def run(program: str, *arguments: str | Path) -> Any:
            print("$", program, *arguments, file=sys.stderr, flush=True)
            command = [str(programs / program), *map(str, arguments)]
            nothing = subprocess.DEVNULL
            return subprocess.check_output(command, cwd=home, env=env, stdin=nothing)

        run("pip", "install", "--quiet", "--no-index", "--find-links", wheels, "pop-local")
        installed_s = time.monotonic() - started_s
        found = json.loads(run("pop-local", "doctor", "--json"))["checks"]
        document = home / "document.txt"
        document.write_text(DOCUMENT.read_text(encoding="utf-8")[:N_CHARS], encoding="utf-8")
        asked = (model, QUESTION, "--file", document, "--max-tokens", "16", "--threads", "1")
        answer = json.loads(run("pop-local", "run", *asked, "--json"))
    took_s, of_processor_s = time.monotonic() - started_s, sum(os.times()[2:4])
    for check in found:
        print(f"{check['title']}: {check['found']}")
    n_pruned = answer["stats"]["n_pruned"]
    print(f"{answer['text']}\n{n_pruned} tokens pruned")
    print(f"installed after {installed_s:.1f} s, answered after {took_s:.1f} s")
    print(f"{of_processor_s:.1f} s of processor time")
    if not answer["text"] or not n_pruned or of_processor_s > LIMIT_S:
        sys.exit("nothing was answered, nothing was pruned, or it took too long")


if __name__ == "__main__":
    main()
