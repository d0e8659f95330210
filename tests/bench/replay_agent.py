"""Measure TTFT of an agent's recorded requests with each kind of reuse. Not a test.

    python tests/bench/replay_agent.py MODEL.gguf FOLDER [FOLDER ...] [--ctx 24576]
        [--repeat 1]

Each FOLDER is one of the agent's sessions, recorded by record_agent.py. All sessions are sent in
order to one server, and each request asks for one token. Each round restarts the server with
--reuse off, exact and edited. Prints a row of JSON per request: its tokens, and for each kind
of reuse the stale and decoded tokens and the seconds (median and range).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx2

from shared import served

KINDS = ("off", "exact", "edited")
PATIENCE_S = 1800


def requests_of(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the paths and bodies of a session's requests, each limited to one token."""
    found = []
    for file in sorted(folder.glob("*.json")):
        path = "/" + file.name.split(".")[1].replace("-", "/")
        body = json.loads(file.read_bytes())
        limit = "max_output_tokens" if path.endswith("/responses") else "max_tokens"
        body.pop("max_completion_tokens", None)
        body.pop("stream_options", None)
        found.append((path, {**body, "stream": False, limit: 1}))
    return found


def replay(model: Path, arguments: list[str], requests: list[tuple[str, dict[str, Any]]]) -> list:
    """Return each request's seconds and usage."""
    found = []
    with (
        served(model, *arguments) as server,
        httpx2.Client(base_url=server.root, timeout=PATIENCE_S) as client,
    ):
        for path, body in requests:
            started_s = time.perf_counter()
            answer = client.post(path, json=body)
            seconds = time.perf_counter() - started_s
            if answer.is_error:
                raise SystemExit(f"the server refused {path}: {answer.text}")
            found.append((seconds, answer.json()["usage"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--ctx", type=int, default=24576)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    named = [(folder, *each) for folder in options.folders for each in requests_of(folder)]
    requests = [(path, body) for _, path, body in named]
    rounds: dict[str, list] = {kind: [] for kind in KINDS}
    for _ in range(options.repeat):
        for kind in KINDS:
            arguments = ["--ctx", str(options.ctx)]
            rounds[kind].append(replay(options.model, [*arguments, "--reuse", kind], requests))
    for index, (folder, path, _) in enumerate(named):
        usage = rounds["off"][0][index][1]
        n_prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        row: dict[str, object] = {"session": folder.name, "path": path, "tokens": n_prompt}
        for kind in KINDS:
            times = [each[index][0] for each in rounds[kind]]
            row[kind] = {
                "usage": rounds[kind][0][index][1].get("pop"),
                "seconds": round(statistics.median(times), 3),
                "range": [round(min(times), 3), round(max(times), 3)],
            }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
