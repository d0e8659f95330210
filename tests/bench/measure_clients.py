"""Measure several clients at once, next to llama-server of the same llama.cpp. Not a test.

    python tests/bench/measure_clients.py MODEL.gguf [--llama PATH/llama-server] [--clients 1,4,8]
        [--shared 2000] [--own 1000] [--decode 64] [--rounds 3] [--llama-args "--kv-unified"]
        [--cpu N] [--json]
    python tests/bench/measure_clients.py MODEL.gguf --beside 4000 [--clients 1,2] [--cpu N]
        [--json]

All clients send one prompt at the same moment: `--shared` common tokens, then `--own` tokens that
differ. The server streams `--decode` tokens to each. Each round restarts every server, in a
rotating order, with a slot for each client and one thread, and warms it up with a short prompt.
TTFT is the time from the request to the first piece of text. Tokens per second count all answers,
from the first request to the last answer's end. An answer without tokens is lost. /metrics counts
pruned rows. This program builds no server.

With `--beside N`, the clients' answers stream while the server reads one prompt of N tokens. The
program measures their tokens per second before and during that prefill, their longest pause, and
the prompt's TTFT.
"""

import argparse
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx2

from measure_speed import machine
from pop_local.measure.speed import Spread, spread
from shared import Served, served

PATIENCE_S = 1800
ROOM = 256  # per slot, in addition to the prompt


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Pin child processes that start until exit to one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cpu is None else {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Answer:
    """A client's seconds to the first token and to the end, with tokens written and cached."""

    ttft_s: float
    end_s: float
    n_decoded: int
    n_cached: int


@dataclass
class Round:
    """The answers to all clients at once."""

    answers: list[Answer] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    n_pruned: int = 0

    @property
    def tokens_per_s(self) -> float:
        return sum(one.n_decoded for one in self.answers) / max(one.end_s for one in self.answers)

    def ttft_s(self, percent: int) -> float:
        found = sorted(one.ttft_s for one in self.answers)
        if len(found) == 1:
            return found[0]
        return quantiles(found, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Row:
    """A server's figures with N clients: medians and extremes of rounds."""

    server: str
    n_clients: int
    tokens_per_s: Spread
    ttft_p50_s: Spread
    ttft_p95_s: Spread
    n_pruned: int
    n_lost: int


@contextmanager
def llama_server(options: argparse.Namespace, n: int, n_ctx: int) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [options.llama, "-m", options.model, "-c", n * n_ctx, "-np", n, "-t", 1, "-tb", 1]
    command += ["--host", "127.0.0.1", "--port", port, *options.llama_args.split()]
    with pinned(options.cpu):
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    root = f"http://127.0.0.1:{port}"
    try:
        _wait_for(root, process)
        yield root
    finally:
        process.kill()
        process.wait()


def _wait_for(root: str, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            if httpx2.get(f"{root}/health", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"llama-server ended with code {process.returncode}")


@contextmanager
def ours(options: argparse.Namespace, n: int, n_ctx: int, *more: str) -> Iterator[Served]:
    with pinned(options.cpu):
        found = served(Path(options.model), "--ctx", n_ctx, "--parallel", n, *more)
        server = found.__enter__()
    try:
        yield server
    finally:
        found.__exit__(None, None, None)


def ask(root: str, tokens: Sequence[int], n_decode: int, begin: Callable[[], object]) -> Answer:
    body = {"prompt": list(tokens), "max_tokens": n_decode, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    begin()
    started_s, ttft_s = time.perf_counter(), 0.0
    usage: dict[str, Any] = {}
    with httpx2.stream("POST", f"{root}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line.removeprefix("data: "))
            if "error" in piece:
                raise ValueError(piece["error"])
            usage = piece.get("usage") or usage
            if not ttft_s and piece["choices"] and piece["choices"][0]["text"]:
                ttft_s = time.perf_counter() - started_s
    end_s = time.perf_counter() - started_s
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(ttft_s or end_s, end_s, usage.get("completion_tokens", 0), cached)


def all_at_once(root: str, prompts: Sequence[Sequence[int]], n_decode: int) -> Round:
    found, lock, together = Round(), threading.Lock(), threading.Barrier(len(prompts))

    def client(tokens: Sequence[int]) -> None:
        try:
            answer = ask(root, tokens, n_decode, together.wait)
            if not answer.n_decoded:
                raise ValueError("no tokens")
        except (httpx2.HTTPError, ValueError) as error:
            with lock:
                found.lost.append(repr(error))
        else:
            with lock:
                found.answers.append(answer)

    threads = [threading.Thread(target=client, args=(tokens,)) for tokens in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@dataclass(frozen=True)
class Beside:
    """Streams during one long prefill.

    `kept`: the smallest share of its tokens per second that a stream keeps, by round."""

    n_streams: int
    n_prompt: int
    kept: Spread
    longest_pause_s: Spread
    ttft_s: Spread


def beside(options: argparse.Namespace, n: int) -> Beside:
    """Measure the share of their speed that streams keep."""
    prompt, *others = prompts_of(options, n + 1, options.beside)
    kept, pauses, ttfts = [], [], []
    for _ in range(options.rounds):
        with ours(options, n + 1, options.beside + ROOM + 1000) as server:
            ask(server.root, prompt[:600], 2, lambda: None)
            streams = [Stream(server.root, tokens[-200:]) for tokens in others]
            while min(len(one.times_s) for one in streams) < 20:
                assert all(one.is_alive() for one in streams), server.log
                time.sleep(0.01)
            began_s = time.perf_counter()
            ttfts.append(ask(server.root, prompt, 1, lambda: None).ttft_s)
            ended_s = time.perf_counter()
            found = [one.times_s.copy() for one in streams]
        kept.append(min(_kept(times_s, began_s, ended_s) for times_s in found))
        pauses.append(max(_longest(times_s, began_s, ended_s) for times_s in found))
    return Beside(n, options.beside, spread(kept), spread(pauses), spread(ttfts))


class Stream(threading.Thread):
    """An answer that streams until the server stops; `times_s`: the times of its pieces."""

    def __init__(self, root: str, tokens: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._body = {"prompt": list(tokens), "max_tokens": 900, "stream": True}
        self._body["grammar"] = "root ::= [^!] root"  # which has no end
        self.times_s: list[float] = []
        self.start()

    def run(self) -> None:
        url = f"{self._root}/v1/completions"
        with (
            suppress(httpx2.HTTPError),
            httpx2.stream("POST", url, json=self._body, timeout=PATIENCE_S) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.times_s.append(time.perf_counter())


def _kept(times_s: Sequence[float], began_s: float, ended_s: float) -> float:
    before = [each for each in times_s if each < began_s][5:]
    during = [each for each in times_s if began_s <= each <= ended_s]
    alone = (len(before) - 1) / (before[-1] - before[0])
    return len(during) / (ended_s - began_s) / alone


def _longest(times_s: Sequence[float], began_s: float, ended_s: float) -> float:
    during = [each for each in times_s if began_s <= each <= ended_s]
    return max(later - earlier for earlier, later in pairwise([began_s, *during]))


def prompts_of(options: argparse.Namespace, n: int, n_tokens: int = 0) -> list[list[int]]:
    """Return prompts from the held-out text, cut by the model's tokens.

    `n_tokens` replaces the numbers of shared and own tokens."""
    kinds = ("prose", "code", "dialogue", "tables")
    heldout = files("pop_local") / "data" / "heldout"
    text = "\n".join((heldout / f"{kind}.txt").read_text(encoding="utf-8") for kind in kinds)
    with ours(options, 1, 512) as server:
        answer = httpx2.post(f"{server.root}/tokenize", json={"content": text}, timeout=60)
        tokens: list[int] = answer.json()["tokens"]
    n_shared, n_own = (0, n_tokens) if n_tokens else (options.shared, options.own)
    shared, rest = tokens[:n_shared], tokens[n_shared:]
    step = max(1, (len(rest) - n_own) // n)
    return [shared + rest[at * step : at * step + n_own] for at in range(n)]


def measured(options: argparse.Namespace, name: str, prompts: Sequence[Sequence[int]]) -> Round:
    n, n_ctx = len(prompts), options.shared + options.own + options.decode + ROOM
    if name == "llama-server":
        with llama_server(options, n, n_ctx) as root:
            ask(root, prompts[0][-8:], 2, lambda: None)
            return all_at_once(root, prompts, options.decode)
    with ours(options, n, n_ctx, *(["--full"] if name == "pop-local, full" else [])) as server:
        ask(server.root, prompts[0][-8:], 2, lambda: None)
        found = all_at_once(server.root, prompts, options.decode)
        found.n_pruned = int(server.metrics()['pop_prompt_tokens_total{kind="pruned"}'])
        return found


def row_of(name: str, n: int, rounds: Sequence[Round]) -> Row:
    return Row(
        name,
        n,
        spread(one.tokens_per_s for one in rounds),
        spread(one.ttft_s(50) for one in rounds),
        spread(one.ttft_s(95) for one in rounds),
        rounds[-1].n_pruned,
        sum(len(one.lost) for one in rounds),
    )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    names = ["pop-local, pruned", "pop-local, full"] + ["llama-server"] * bool(options.llama)
    for n in map(int, options.clients.split(",")):
        prompts = prompts_of(options, n)
        rounds: dict[str, list[Round]] = {name: [] for name in names}
        for number in range(options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                rounds[name].append(measured(options, name, prompts))
        for name in names:
            yield row_of(name, n, rounds[name])


def shown(found: Spread) -> str:
    return f"{found.median:.2f} ({found.min:.2f}-{found.max:.2f})"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("model")
    options.add_argument("--llama", help="a built llama-server")
    options.add_argument("--llama-args", default="", help="more of its options")
    options.add_argument("--clients", default="1,4,8")
    for name, default in (("shared", 2000), ("own", 1000), ("decode", 64), ("rounds", 3)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--beside", type=int, help="tokens of a prompt beside streams")
    options.add_argument("--cpu", type=int, help="pin servers to this CPU")
    options.add_argument("--json", action="store_true")
    parsed = options.parse_args()
    if parsed.beside:
        for n in map(int, parsed.clients.split(",")):
            found = beside(parsed, n)
            if parsed.json:
                print(json.dumps({"machine": machine(), **asdict(found)}))
            else:
                figures = (found.kept, found.longest_pause_s, found.ttft_s)
                print(f"| {n} | {' | '.join(map(shown, figures))} |", flush=True)
        return
    rows = []
    if not parsed.json:
        print("| server | clients | tokens/s | TTFT p50, s | TTFT p95, s | pruned | lost |")
        print("|---|---:|---:|---:|---:|---:|---:|")
    for row in measure(parsed):
        rows.append(row)
        figures = (row.tokens_per_s, row.ttft_p50_s, row.ttft_p95_s)
        line = " | ".join([row.server, str(row.n_clients), *map(shown, figures)])
        if not parsed.json:
            print(f"| {line} | {row.n_pruned} | {row.n_lost} |", flush=True)
    if parsed.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}))
    else:
        print(machine())


if __name__ == "__main__":
    main()
