"""Many clients at one server for minutes: nothing is lost, memory stays flat. Not a test.

    python tests/bench/measure_soak.py MODEL.gguf [--seconds 180] [--clients 8]

Each client asks in turns of a random kind: a whole answer, a stream, one read in full, one with log
probabilities, one that hangs up in the middle of an endless answer, one malformed. A grammar makes
the model repeat a mark, so that an answer meant for somebody else is seen. Prints one JSON object,
and exits with 1 if anything was lost. Linux only: memory comes from /proc.
"""

import argparse
import json
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from shared import Served, served

STORY = (
    "The ferry to the island leaves the stone pier at half past six. Old Mara sells coffee there, "
    "and her dog sleeps under the table. "
)
ENDLESS = "root ::= [a-z] root"
WATCH_EVERY_S = 15


@dataclass
class Tally:
    """What all clients have seen; `lost` has what was not answered as it should be."""

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
        self._kinds = {
            "whole": self._whole,
            "streamed": self._streamed,
            "in full": self._in_full,
            "log probabilities": self._logprobs,
            "hung up": self._hung_up,
            "malformed": self._malformed,
        }

    def run(self, end_s: float, tally: Tally) -> None:
        name = self._api.models.list().data[0].id
        n_turns = 0
        while time.monotonic() < end_s:
            n_turns += 1
            mark = f"client {self._number} turn {n_turns}"
            kind = self._rng.choice(list(self._kinds))
            content = mark + STORY * self._rng.randint(1, 8)
            request = {"model": name, "messages": [{"role": "user", "content": content}]}
            try:
                got = self._kinds[kind](request, mark)
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
        try:
            self._api.chat.completions.create(**request, n=3)
        except openai.BadRequestError:
            return mark
        return "no error"


def resident_mb(server: Served) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    tally = Tally()
    memory_mb = []
    with served(options.model, "--ctx", 2048) as server:
        end_s = time.monotonic() + options.seconds
        threads = [
            threading.Thread(target=Client(server, number).run, args=(end_s, tally))
            for number in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(WATCH_EVERY_S)
            memory_mb.append(round(resident_mb(server), 1))
        if "Traceback" in server.log:
            tally.lost.append("a traceback in the server's log")
    print(json.dumps({"turns": tally.turns, "lost": tally.lost, "resident_mb": memory_mb}))
    if tally.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
