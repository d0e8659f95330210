"""Many clients at one server for minutes: nothing is lost, memory stays flat. Not a test.

    python tests/bench/measure_soak.py MODEL.gguf [--seconds 1800] [--clients 8] [--cache-ram 64]

Each client asks in turns of a random kind: a whole answer, a stream, one read in full, one with log
probabilities; one in ten hangs up in the middle of an endless answer, one in ten is malformed, one
in twenty has a grammar that would take all time or memory. A grammar makes the model repeat a mark,
so that an answer meant for somebody else is seen. Memory, descriptors and /health are read all the
while; memory grows until the cache of prompts is full. With --json one JSON object is printed.
Exits with 1 if anything was lost. Linux only: it reads /proc.
"""

import argparse
import json
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from shared import BOMB, Served, served

STORY = (
    "The ferry to the island leaves the stone pier at half past six. Old Mara sells coffee there, "
    "and her dog sleeps under the table. "
)
ENDLESS = "root ::= [a-z] root"
_MANY = {"type": "object", "properties": {f"p{n}": {} for n in range(10_000)}}
BOMBS: tuple[dict[str, Any], ...] = (
    {"grammar": f'root ::= a0 "z"\n{BOMB[:-2]}"a"'},
    *(
        {"response_format": {"type": "json_object", "schema": schema}}
        for schema in ({"type": "integer", "multipleOf": 999_983}, _MANY)
    ),
)
MALFORMED: tuple[dict[str, Any], ...] = (
    *({"n": 3}, {"messages": []}, {"max_tokens": "many"}, {"temperature": -1}),
    *({"grammar": "nonsense"}, {"stop": [""]}, {"tools": [{"type": "function"}]}),
)
WATCH_EVERY_S = 5


@dataclass
class Tally:
    """The answers to all clients; `lost` has those that were not as it should be."""

    turns: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, mark: str, got: str) -> None:
        with self.lock:
            self.turns[kind] += 1
            if got != mark:
                self.lost.append(f"{kind}, {mark}: {got}")


class Client:
    """One client; its turns follow from its number."""

    def __init__(self, server: Served, number: int) -> None:
        self._api = openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=300)
        self._rng = random.Random(number)
        self._number = number
        # With their shares, in percent.
        self._kinds = {
            "whole": (self._whole, 30),
            "streamed": (self._streamed, 25),
            "in full": (self._in_full, 10),
            "log probabilities": (self._logprobs, 10),
            "hung up": (self._hung_up, 10),
            "malformed": (self._malformed, 10),
            "bombs": (self._bomb, 5),
        }

    def run(self, end_s: float, tally: Tally) -> None:
        name = self._api.models.list().data[0].id
        n_turns = 0
        while time.monotonic() < end_s:
            n_turns += 1
            mark = f"client {self._number} turn {n_turns}"
            shares = [share for _, share in self._kinds.values()]
            [kind] = self._rng.choices(list(self._kinds), shares)
            content = mark + STORY * self._rng.randint(1, 8)
            request = {"model": name, "messages": [{"role": "user", "content": content}]}
            try:
                got = self._kinds[kind][0](request, mark)
            except Exception as error:
                got = repr(error)
            tally.add(kind, mark, got)

    def _ask(self, request: dict[str, Any], mark: str, pop: bool = True, **options: Any) -> Any:
        body = {"grammar": f'root ::= "{mark}"', "pop": pop}
        return self._api.chat.completions.create(**request, extra_body=body, **options)

    def _whole(self, request: dict[str, Any], mark: str) -> str:
        return str(self._ask(request, mark).choices[0].message.content)

    def _streamed(self, request: dict[str, Any], mark: str) -> str:
        pieces = self._ask(request, mark, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def _in_full(self, request: dict[str, Any], mark: str) -> str:
        reply = self._ask(request, mark, pop=False)
        n_pruned = reply.usage.pop["n_pruned"]
        return f"{n_pruned} pruned" if n_pruned else str(reply.choices[0].message.content)

    def _logprobs(self, request: dict[str, Any], mark: str) -> str:
        reply = self._ask(request, mark, logprobs=True, top_logprobs=5)
        return "".join(one.token for one in reply.choices[0].logprobs.content)

    def _hung_up(self, request: dict[str, Any], mark: str) -> str:
        body = {"grammar": ENDLESS}
        stream = self._api.chat.completions.create(**request, stream=True, extra_body=body)
        for _ in range(self._rng.randint(1, 6)):
            next(stream)
        stream.close()
        return mark

    def _malformed(self, request: dict[str, Any], mark: str) -> str:
        return self._refused(request | self._rng.choice(MALFORMED), mark)

    def _bomb(self, request: dict[str, Any], mark: str) -> str:
        return self._refused(request | self._rng.choice(BOMBS), mark)

    def _refused(self, request: dict[str, Any], mark: str) -> str:
        try:
            self._api.chat.completions.create(
                messages=request.pop("messages"), model=request.pop("model"), extra_body=request
            )
        except openai.BadRequestError:
            return mark
        return "no error"


@dataclass(frozen=True)
class Seen:
    """The server at one time: its own memory, that of its children, its descriptors."""

    after_s: float
    resident_mb: float
    children_mb: float
    n_descriptors: int
    n_children: int


def look(server: Served, began_s: float) -> Seen:
    """Raises what /health answers, if it is not well."""
    httpx2.get(f"{server.root}/health", timeout=30).raise_for_status()
    process = psutil.Process(server.process.pid)
    sizes = []
    for child in process.children():
        with suppress(psutil.Error):  # it was one
            sizes.append(child.memory_info().rss / 1e6)
    return Seen(
        after_s=round(time.monotonic() - began_s),
        resident_mb=round(process.memory_info().rss / 1e6, 1),
        children_mb=round(sum(sizes), 1),
        n_descriptors=process.num_fds(),
        n_children=len(sizes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cache-ram", type=int, default=64, help="MiB, as of pop-local serve")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    tally = Tally()
    seen: list[Seen] = []
    with served(options.model, "--ctx", 2048, "--cache-ram", options.cache_ram) as server:
        began_s = time.monotonic()
        threads = [
            threading.Thread(
                target=Client(server, number).run, args=(began_s + options.seconds, tally)
            )
            for number in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(WATCH_EVERY_S)
            try:
                seen.append(look(server, began_s))
            except httpx2.HTTPError as error:
                tally.lost.append(f"/health: {error!r}")
        if "Traceback" in server.log:
            tally.lost.append("a traceback in the server's log")
        server.process.terminate()
        began_s = time.monotonic()
        status = server.process.wait(60)
        ended_s = round(time.monotonic() - began_s, 1)
        if status != 128 + signal.SIGTERM:
            tally.lost.append(f"exit status {status}")
        last_words = server.log.splitlines()[-3:]
    if options.json:
        figures = {"turns": tally.turns, "lost": tally.lost, "ended_s": ended_s, "log": last_words}
        print(json.dumps(figures | {"seen": [asdict(one) for one in seen]}))
    else:
        print(*(f"{n:6} {kind}" for kind, n in tally.turns.items()), sep="\n")
        print(f"{len(tally.lost):6} lost", *tally.lost, f"ended within {ended_s} s", sep="\n")
        for one in seen[:: max(1, len(seen) // 20)]:
            print(one)
    if tally.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
