"""How long a request waits for refilling that is under way. Not a test.

    python tests/bench/measure_refill.py MODEL.pop.gguf [--requests 30] [--pop SIDECAR]

A server on one thread gets a long prompt, then, while it refills, a short one; `queued_s` of the
reply is what that one waited. Every other time refilling is left to go on for longer. Prints one
JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from shared import served

STORY = "The ferry to the island leaves the stone pier at half past six, whatever the weather. "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--pop", type=Path)
    parser.add_argument("--requests", type=int, default=30)
    given = parser.parse_args()
    sidecar = ("--pop", given.pop) if given.pop else ()
    waited_s, refilled = [], []
    with served(given.model, *sidecar, "--ctx", 4096) as server:
        for number in range(given.requests):
            long = f"{number}. " + STORY * 60
            server.post("completions", prompt=long, max_tokens=1, temperature=0, timeout=600)
            time.sleep(0.3 if number % 2 else 1.0)
            reply = server.post(
                "completions", prompt=long + "When?", max_tokens=1, temperature=0, timeout=600
            )
            pop = reply.json()["usage"]["pop"]
            waited_s.append(pop["queued_s"])
            refilled.append(pop["n_refilled"])
        metrics = server.metrics()
    print(
        json.dumps(
            {
                "requests": given.requests,
                "waited_s": {"median": statistics.median(waited_s), "max": max(waited_s)},
                "refilled_before": {"median": statistics.median(refilled), "max": max(refilled)},
                "pop_refilled_tokens_total": metrics["pop_refilled_tokens_total"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
