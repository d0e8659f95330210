"""Measure prompts that share a server: waiting times and constant answers. Not a test.

    python tests/bench/measure_turns.py MODEL.gguf --long 7000 [--rounds 3]
    python tests/bench/measure_turns.py MODEL.gguf --clients 8 [--long 3000] [--rounds 3]
    python tests/bench/measure_turns.py MODEL.gguf --repeat 1000

Without --clients, each round reads a long prompt alone and then again, with a ten-token question
that arrives once 1,000 tokens of it have been read. With --clients N, two clients send long prompts
and the others send short ones, one after the other, until the long ones have been answered. The
program prints the time to first token (TTFT), and the CPU time that the server used in this time,
which other programs on the machine hardly change. It also prints by how much the question delays
the long prompt, as the mean of the rounds with its standard error.

With --repeat N, one client sends eight prompts N times in random order, at temperature 0, to a
server with four slots. The program prints how many different answers each prompt got.
"""

import argparse
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles, stdev

import httpx2
import psutil

from measure_clients import prompts_of
from measure_speed import machine
from shared import Served, served

PATIENCE_S = 1800
N_QUESTION = 10
N_ANSWER = 8
READ_BEFORE = 1000
N_LONG_CLIENTS = 2
QUESTIONS = [
    "Name a color.",
    "What is the capital of France? Answer in one word.",
    "Write the first line of a story about a fox.",
    "List three fruits, please, separated by commas.",
    "Who painted the Mona Lisa, and in which city can visitors see it today?",
    "Translate into German: the house is small, the garden is large, and the river is far away.",
    "Continue this sequence of numbers: " + ", ".join(str(3 * n) for n in range(40)),
    "Summarize in one sentence: " + "The lamp at the harbor was lit every evening at six. " * 12,
]


@dataclass(frozen=True)
class Wait:
    """A prompt's time to first token, and the server's CPU time in it, both in seconds."""

    ttft_s: float
    cpu_s: float


def ask(
    server: Served, tokens: Sequence[int], has_read: Callable[[int], object] = lambda _: 0
) -> Wait:
    """Send a prompt. `has_read` is called with the number of tokens read so far."""
    process = psutil.Process(server.process.pid)
    body = {"prompt": list(tokens), "max_tokens": N_ANSWER, "temperature": 0, "stream": True}
    body |= {"cache_prompt": False, "return_progress": True}
    wait = None
    started_s, used_s = time.perf_counter(), sum(process.cpu_times()[:2])
    with httpx2.stream(
        "POST", f"{server.api}/completions", json=body, timeout=PATIENCE_S
    ) as answer:
        for line in answer.iter_lines():
            piece = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            if progress := piece.get("prompt_progress"):
                has_read(progress["processed"])
            elif wait is None and piece.get("choices"):
                cpu_s = sum(process.cpu_times()[:2]) - used_s
                wait = Wait(time.perf_counter() - started_s, cpu_s)
    if wait is None:
        raise SystemExit("an answer was lost")
    return wait


def beside(server: Served, long: Sequence[int], short: Sequence[int]) -> tuple[Wait, Wait]:
    """Return the waits of a long prompt and of a question that arrives while it is read."""
    found: list[Wait] = []
    client = threading.Thread(target=lambda: found.append(ask(server, short)))

    def has_read(n: int) -> None:
        if n >= READ_BEFORE and client.ident is None:
            client.start()

    wait = ask(server, long, has_read)
    client.join()
    return wait, found[0]


def together(
    server: Served, prompts: Sequence[Sequence[int]], n_clients: int
) -> tuple[list[Wait], list[Wait]]:
    """Return the waits of long prompts and of the short prompts next to them."""
    waits: tuple[list[Wait], list[Wait]] = ([], [])
    is_over = threading.Event()

    def send_short(number: int) -> None:
        chosen = random.Random(number)
        while not is_over.is_set():
            tokens = chosen.choice(prompts)
            at = chosen.randrange(len(tokens) - 50)
            waits[1].append(ask(server, tokens[at : at + chosen.randrange(N_QUESTION, 50)]))
            is_over.wait(chosen.random())

    def send_long(number: int) -> None:
        for tokens in prompts[number::N_LONG_CLIENTS]:
            waits[0].append(ask(server, tokens))

    long = [threading.Thread(target=send_long, args=(n,)) for n in range(N_LONG_CLIENTS)]
    short = [threading.Thread(target=send_short, args=(n,)) for n in range(2, n_clients)]
    for thread in (*long, *short):
        thread.start()
    for thread in long:
        thread.join()
    is_over.set()
    for thread in short:
        thread.join()
    return waits


def repeated(server: Served, n: int) -> list[Counter[str]]:
    """Return the answers to each of the questions, with their numbers."""
    found: list[Counter[str]] = [Counter() for _ in QUESTIONS]
    chosen = random.Random(1)
    for _ in range(n):
        number = chosen.randrange(len(QUESTIONS))
        messages = [{"role": "user", "content": QUESTIONS[number]}]
        sent = {"messages": messages, "temperature": 0, "max_tokens": N_ANSWER}
        answer = server.post("chat/completions", timeout=PATIENCE_S, **sent).json()
        found[number][answer["choices"][0]["message"]["content"]] += 1
    return found


def shown(name: str, waits: Sequence[Wait]) -> str:
    def figures(values: list[float]) -> str:
        p95 = quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
        return f"{median(values):.2f} | {p95:.2f}"

    ttft, cpu = figures([one.ttft_s for one in waits]), figures([one.cpu_s for one in waits])
    return f"| {name} | {len(waits)} | {ttft} | {cpu} |"


def growth(before: Sequence[float], after: Sequence[float]) -> str:
    """Return the mean growth of pairs in percent, with its standard error."""
    each = [100 * (b / a - 1) for a, b in zip(before, after, strict=True)]
    error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return f"{fmean(each):.1f} % ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--long", type=int, default=3000, help="tokens of a long prompt")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--serve", default="", help="more options of serve")
    parser.set_defaults(cpu=None)
    options = parser.parse_args()
    print(f"{machine()}, load {psutil.getloadavg()[0]:.0f}")
    model, more = Path(options.model), options.serve.split()
    if options.repeat:
        with served(model, "--parallel", 4, "--ctx", 2048, *more) as server:
            found = repeated(server, options.repeat)
        for question, answers in zip(QUESTIONS, found, strict=True):
            print(f"{question[:40]!r}: {sorted(answers.values(), reverse=True)}")
        return
    prompts = prompts_of(options, N_LONG_CLIENTS * options.rounds, options.long)
    n_slots = options.clients or 2
    how = ("--parallel", n_slots, "--ctx", options.long + 256, "--refill", "off", *more)
    print("| prompts | number | TTFT p50, s | p95, s | CPU p50, s | p95, s |")
    print("|---|---:|---:|---:|---:|---:|")
    with served(model, *how) as server:
        ask(server, prompts[0][:N_QUESTION])
        if options.clients:
            long, short = together(server, prompts, options.clients)
            rows: dict[str, list[Wait]] = {"long": long, "short": short}
        else:
            rows = {"long, alone": [], "long, with a question": [], "question": []}
            for tokens in prompts[: options.rounds]:
                rows["long, alone"].append(ask(server, tokens))
                both = beside(server, tokens, prompts[-1][:N_QUESTION])
                rows["long, with a question"].append(both[0])
                rows["question"].append(both[1])
    for name, waits in rows.items():
        print(shown(name, waits))
    if not options.clients:
        alone, with_question, _ = rows.values()
        for name in ("ttft_s", "cpu_s"):
            figures = [[getattr(one, name) for one in waits] for waits in (alone, with_question)]
            print(f"the long prompts' {name} grows by {growth(*figures)}")


if __name__ == "__main__":
    main()
