"""The cost of the server for one client, against `pop-local run`. Not a test.

    python tests/bench/measure_server.py MODEL [--words 300] [--decode 256] [--rounds 9] [--cpu N]
                                         [--clock wall|cpu] [--json]

Two children with a thread for the model each: `pop-local serve`, and one that calls the command
`run --json` over and over with a model that stays open. In each round `run`, a whole answer of the
server and a streamed one take the same prompt at temperature 0, in an order that rotates. All must
say the same, read as much from the cache and prune the same rows.

Timed, wall: from the question's leaving this process (for the server one HTTP request, on an open
connection) until the last byte of the answer is here. Timed, cpu: what the child uses meanwhile,
and in the moment after, in all its threads; a streaming client that wakes up for every token is
not in it. Not timed: opening the model, taking the answer apart, and before each answer a short one
to another question, which empties the KV cache. The first round only warms up.
"""

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.resources import files
from pathlib import Path
from typing import Any

from overhead import Answered, Overhead, overhead, parser, pinned, report
from pop_local.commands import run as run_module
from pop_local.engine.model import PopModel
from shared import served

QUESTION = "Write a long guide to this place in Markdown, with headings, lists and **bold** words."
OTHER_QUESTION = "Who are you?"
# So that what follows an answer, such as the log, is in the CPU time.
SETTLED_S = 0.05

Ask = Callable[[str, int], bytes]


@dataclass(frozen=True)
class Way:
    """`ask(question, n_decode)` gives the bytes that came, which `answered` reads."""

    name: str
    pid: int
    ask: Ask
    answered: Callable[[bytes], Answered]


def seconds(way: Way, question: str, n_decode: int, clock: str) -> tuple[float, Answered]:
    way.ask(OTHER_QUESTION, 1)
    time.sleep(SETTLED_S)
    started_s = now_s(way.pid, clock)
    received = way.ask(question, n_decode)
    if clock == "cpu":
        time.sleep(SETTLED_S)
    taken_s = now_s(way.pid, clock) - started_s
    return taken_s, way.answered(received)


def now_s(pid: int, clock: str) -> float:
    # Linux's id of a process's CPU clock; see clock_getcpuclockid(3).
    return time.perf_counter() if clock == "wall" else time.clock_gettime((~pid << 3) | 2)


# --- run


def child(options: argparse.Namespace) -> None:
    """Answers lines of JSON with what `run --json` prints, in one line."""
    model = PopModel(options.model, n_ctx=options.ctx, n_threads=1, n_gpu_layers=0)
    run_module.Opener.__call__ = lambda *_: model  # type: ignore[method-assign]
    questions, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO())
    for line in questions:
        question, n_decode = json.loads(line)
        with redirect_stdout(io.StringIO()) as printed:
            run_module.run(options.model, question, json=True, temperature=0, max_tokens=n_decode)
        print(printed.getvalue().replace("\n", ""), flush=True)


@contextmanager
def running(options: argparse.Namespace, n_ctx: int) -> Iterator[Way]:
    process = subprocess.Popen(
        [sys.executable, __file__, options.model, "--ctx", str(n_ctx)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def ask(question: str, n_decode: int) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([question, n_decode]).encode() + b"\n")
        process.stdin.flush()
        return process.stdout.readline()

    try:
        yield Way("run", process.pid, ask, of_run)
    finally:
        process.kill()
        process.wait()


def of_run(received: bytes) -> Answered:
    answer = json.loads(received)
    stats = answer["stats"]
    names = ("n_prompt", "n_cached", "n_pruned", "n_decoded")
    return Answered(answer["text"], *(stats[name] for name in names))


# --- the server


def asking(address: str, more: dict[str, Any]) -> Ask:
    def ask(question: str, n_decode: int) -> bytes:
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "temperature": 0, "max_tokens": n_decode, **more}
        received = []
        with closing(HTTPConnection(address, timeout=600)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            while piece := response.read1(65536):
                received.append(piece)
        return b"".join(received)

    return ask


def of_whole(received: bytes) -> Answered:
    answer = json.loads(received)
    return of_usage(answer["choices"][0]["message"]["content"], answer["usage"])


def of_stream(received: bytes) -> Answered:
    lines = [line.removeprefix(b"data: ") for line in received.splitlines() if line]
    *events, figures = [json.loads(line) for line in lines[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events]
    return of_usage("".join(delta.get("content", "") for delta in deltas), figures["usage"])


def of_usage(text: str, usage: dict[str, Any]) -> Answered:
    return Answered(
        text,
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["pop"]["n_pruned"],
        usage["completion_tokens"],
    )


# --- the rounds


def measure(options: argparse.Namespace, ways: list[Way]) -> Iterator[Overhead]:
    text = (files("pop_local") / "data" / "document.md").read_text(encoding="utf-8")
    question = " ".join([*text.split(" ")[: options.words], QUESTION])
    taken_s: dict[str, list[float]] = {way.name: [] for way in ways}
    answers = set()
    for number in range(options.rounds + 1):
        shift = number % len(ways)
        for way in ways[shift:] + ways[:shift]:
            one_s, answered = seconds(way, question, options.decode, options.clock)
            answers.add(answered)
            if number > 0:
                taken_s[way.name].append(one_s)
    (answered,) = answers
    run, *others = ways
    for way in others:
        n = answered.n_decoded
        yield overhead(way.name, answered, n, taken_s[run.name], taken_s[way.name])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--words", type=int, default=300, help="of the document in the prompt")
    options.add_argument("--ctx", type=int, help=argparse.SUPPRESS)
    parsed = options.parse_args()
    if parsed.ctx:
        child(parsed)
        return
    n_ctx = 3 * parsed.words + parsed.decode + 256
    with ExitStack() as stack:
        with pinned(parsed.cpu):
            server = stack.enter_context(
                served(Path(parsed.model), "--ctx", n_ctx, "--refill", "off")
            )
            run = stack.enter_context(running(parsed, n_ctx))
        address = server.root.removeprefix("http://")
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        pid = server.process.pid
        whole = Way("server, whole", pid, asking(address, {}), of_whole)
        stream = Way("server, streamed", pid, asking(address, streamed), of_stream)
        print(report(parsed, list(measure(parsed, [run, whole, stream]))))


if __name__ == "__main__":
    main()
