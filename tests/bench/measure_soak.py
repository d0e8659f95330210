"""Run many clients against one server for minutes, and check answers and memory. Not a test.

    python tests/bench/measure_soak.py [MODEL.gguf] [--seconds 1800] [--clients 8] [--parallel 4]
        [--ends 20] [--hostile 1]

Each client sends turns of a random kind: whole answers, streams, tools, pictures, other APIs. Some
clients disconnect during an endless answer, some requests are malformed, and some have a grammar
that would take all time or memory. A grammar makes the model repeat a mark, which reveals another
client's answer. Some greedy requests repeat fixed prompts; the program prints how many answers
equal a lone client's. It reads memory, descriptors and /health throughout; memory grows until the
prompt cache is full. Then --ends servers get a SIGTERM at a random moment. The default MODEL is a
tiny random vision model that catches up between requests; other models get no pictures. --json
prints one JSON object. Exits with 1 if an answer was lost. Linux only: it reads /proc.

Each client has its own API key. With --hostile N, N more clients send grammar bombs, schemas at the
limit, slow uploads, and streams that they abandon, and the other clients send no bombs. The program
prints the honest clients' times to the first streamed text; compare them with --hostile 0.
"""

import argparse
import json
import random
import signal
import socket
import tempfile
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
from PIL import Image

from shared import BOMB, Served, make_vision_model, served

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
    *({"n": 0}, {"messages": []}, {"max_tokens": "many"}, {"temperature": -1}),
    *({"grammar": "nonsense"}, {"stop": [""]}, {"tools": [{"type": "function"}]}),
    *({"tool_choice": "required"}, {"tools": [{"type": "retrieval"}]}),
)
WATCH_EVERY_S = 5
FIXED = [f"Fixed {number}. {STORY * (1 + number)}" for number in range(6)]
OTHER = "another answer than a lone client's"


@dataclass
class Tally:
    """The answers to all clients; `lost` describes the wrong ones."""

    turns: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)  # hostile requests, by status
    lost: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, mark: str, got: str) -> None:
        with self.lock:
            self.turns[kind] += 1
            if got != mark:
                self.lost.append(f"{kind}, {mark}: {got}")


class Client:
    """A client, whose number determines its turns."""

    def __init__(
        self, server: Served, number: int, inputs: "Inputs", tally: Tally, *, has_bombs: bool
    ) -> None:
        self._root, self._pictures, self._alone = server.root, inputs.pictures, inputs.alone
        self._key, self._tally = key_of(number), tally
        self._api = openai.OpenAI(
            base_url=server.api, api_key=self._key, max_retries=0, timeout=300
        )
        self._rng = random.Random(number)
        self._number = number
        # With their shares, in percent.
        self._kinds = {
            "whole": (self._whole, 10),
            "as alone": (self._as_alone, 5 if self._alone else 0),
            "streamed": (self._streamed, 15),
            "in full": (self._in_full, 8),
            "log probabilities": (self._logprobs, 7),
            "tools": (self._tools, 10),
            "tools, streamed": (self._streamed_tools, 10),
            "messages": (self._message, 5),
            "responses": (self._response, 5),
            "ollama": (self._ollama, 5),
            "pictures": (self._picture, 10 if self._pictures else 0),
            "hung up": (self._hung_up, 10),
            "malformed": (self._malformed, 8),
            "bombs": (self._bomb, 2 if has_bombs else 0),
        }

    def run(self, end_s: float) -> None:
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
                if got == OTHER:
                    kind, got = "other than alone", mark
            except Exception as error:
                got = repr(error)
            self._tally.add(kind, mark, got)

    def _ask(self, request: dict[str, Any], mark: str, pop: bool = True, **options: Any) -> Any:
        body = {"grammar": f'root ::= "{mark}"', "pop": pop}
        return self._api.chat.completions.create(**request, extra_body=body, **options)

    def _whole(self, request: dict[str, Any], mark: str) -> str:
        return str(self._ask(request, mark).choices[0].message.content)

    def _as_alone(self, request: dict[str, Any], mark: str) -> str:
        number = self._rng.randrange(len(FIXED))
        return (
            mark if greedy(self._root, FIXED[number], self._key) == self._alone[number] else OTHER
        )

    def _streamed(self, request: dict[str, Any], mark: str) -> str:
        began_s, text = time.monotonic(), ""
        for piece in self._ask(request, mark, stream=True):
            said = piece.choices[0].delta.content or ""
            if said and not text:
                self._tally.ttft_s.append(time.monotonic() - began_s)
            text += said
        return text

    def _in_full(self, request: dict[str, Any], mark: str) -> str:
        reply = self._ask(request, mark, pop=False)
        n_pruned = reply.usage.pop["n_pruned"]
        return f"{n_pruned} pruned" if n_pruned else str(reply.choices[0].message.content)

    def _logprobs(self, request: dict[str, Any], mark: str) -> str:
        reply = self._ask(request, mark, logprobs=True, top_logprobs=5)
        return "".join(one.token for one in reply.choices[0].logprobs.content)

    def _tools(self, request: dict[str, Any], mark: str) -> str:
        answer = self._api.chat.completions.create(**request, **calling(mark))
        [call] = answer.choices[0].message.tool_calls or []
        return str(json.loads(call.function.arguments)["mark"])

    def _streamed_tools(self, request: dict[str, Any], mark: str) -> str:
        with self._api.chat.completions.stream(**request, **calling(mark)) as stream:
            said = stream.get_final_completion().choices[0].message
        [call] = said.tool_calls or []
        return str(json.loads(call.function.arguments)["mark"])

    def _message(self, request: dict[str, Any], mark: str) -> str:
        tool = {"name": "say", "input_schema": schema_of(mark)}
        body = {**request, "max_tokens": 500, "tools": [tool], "tool_choice": {"type": "any"}}
        return str(self._post("/v1/messages", body)["content"][0]["input"]["mark"])

    def _response(self, request: dict[str, Any], mark: str) -> str:
        form = {"type": "json_schema", "name": "a", "schema": {"const": mark}}
        asked = request["messages"][0]["content"]
        body = {"input": asked, "text": {"format": form}}
        output = self._post("/v1/responses", body)["output"]
        return str(json.loads(output[0]["content"][0]["text"]))

    def _ollama(self, request: dict[str, Any], mark: str) -> str:
        body = {**request, "format": {"const": mark}, "stream": False}
        return str(json.loads(self._post("/api/chat", body)["message"]["content"]))

    def _picture(self, request: dict[str, Any], mark: str) -> str:
        url = {"type": "image_url", "image_url": {"url": self._rng.choice(self._pictures)}}
        text = {"type": "text", "text": request["messages"][0]["content"]}
        messages = [{"role": "user", "content": [url, text]}]
        return str(self._ask(request | {"messages": messages}, mark).choices[0].message.content)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx2.post(f"{self._root}{path}", json=body, timeout=300, headers=sent(self._key))
        answer.raise_for_status()
        return answer.json()

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


class Hostile:
    """A client that tries to take the server from the others, with several requests at a time."""

    def __init__(self, server: Served, number: int, tally: Tally) -> None:
        self._root, self._key, self._tally = server.root, key_of(number), tally
        rules = [f"r{n} ::= r{n + 1}" for n in range(9_000)]
        chain = "\n".join(["root ::= r0", *rules, 'r9000 ::= "a"'])
        at_limit = {"type": "integer", "multipleOf": 49_999}
        form = {"response_format": {"type": "json_object", "schema": at_limit}}
        self._bodies = (*BOMBS, {"grammar": chain}, form)

    def threads(self, end_s: float) -> list[threading.Thread]:
        kinds = [*[self._compile] * 6, *[self._upload] * 6, self._hang_up]
        return [threading.Thread(target=self._repeat, args=(kind, end_s)) for kind in kinds]

    def _repeat(self, kind: Any, end_s: float) -> None:
        rng = random.Random(0)
        while time.monotonic() < end_s:
            with suppress(OSError, httpx2.HTTPError):
                status = kind(rng)
                self._tally.refused[status] += 1

    def _compile(self, rng: random.Random) -> int:
        said = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        return self._post(said | rng.choice(self._bodies), timeout=60)

    def _hang_up(self, rng: random.Random) -> int:
        said = {"messages": [{"role": "user", "content": STORY * 10}]}
        with suppress(httpx2.TimeoutException):
            self._post(said | {"grammar": ENDLESS}, timeout=rng.uniform(0.1, 2))
        return 499

    def _post(self, body: dict[str, Any], timeout: float) -> int:
        url = f"{self._root}/v1/chat/completions"
        return httpx2.post(url, json=body, timeout=timeout, headers=sent(self._key)).status_code

    def _upload(self, rng: random.Random) -> int:
        host, port = self._root.removeprefix("http://").split(":")
        head = f"POST /page/file?name=a.txt HTTP/1.1\r\nHost: {host}\r\nContent-Length: 50\r\n"
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"{head}Authorization: Bearer {self._key}\r\n\r\n".encode())
            for _ in range(20):
                connection.sendall(b"a")
                time.sleep(1)
        return 499


def key_of(number: int) -> str:
    return f"key-{number}"


def sent(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def schema_of(mark: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"mark": {"const": mark}}, "required": ["mark"]}


def calling(mark: str) -> dict[str, Any]:
    """Make the model call a tool, with this mark."""
    function = {"name": "say", "parameters": schema_of(mark)}
    tools = [{"type": "function", "function": function}]
    return {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}


def greedy(root: str, content: str, key: str) -> str:
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    url = f"{root}/v1/chat/completions"
    answer = httpx2.post(url, json=body, timeout=300, headers=sent(key))
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Inputs:
    """The clients' pictures, as data URLs, and a lone client's answers to FIXED."""

    pictures: Sequence[str]
    alone: Sequence[str] = ()


@dataclass(frozen=True)
class Seen:
    """A snapshot of the server: its memory, its children's memory, its descriptors."""

    after_s: float
    resident_mb: float
    children_mb: float
    n_descriptors: int
    n_children: int


def look(server: Served, began_s: float) -> Seen:
    """Raise /health's error, if it reports one."""
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


def url_of(size: int) -> str:
    """Return a picture of noise as a data URL."""
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cache-ram", type=int, default=64, help="MiB, as of pop-local serve")
    parser.add_argument("--parallel", type=int, default=4, help="as of pop-local serve")
    parser.add_argument("--ends", type=int, default=20)
    parser.add_argument("--hostile", type=int, help="hostile clients, in addition to --clients")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_vision_model(Path(folder), "llama")
        pictures = [] if options.model else [url_of(n) for n in (64, 200, 300)]
        soak(model, pictures, options)


def ended(
    model: Path, pictures: list[str], options: argparse.Namespace, rng: random.Random
) -> float:
    """Return the seconds that a busy server takes to shut down, from a random moment on."""
    tally = Tally()
    with served(model, "--ctx", 2048, "--parallel", options.parallel, *keys(options)) as server:
        end_s = time.monotonic() + 60
        for thread in asking(server, Inputs(pictures), options, end_s, tally):
            thread.daemon = True
            thread.start()
        time.sleep(rng.uniform(0, 8))
        server.process.terminate()
        began_s = time.monotonic()
        server.process.wait(60)
        return time.monotonic() - began_s


def keys(options: argparse.Namespace) -> list[str]:
    n_keys = options.clients + (options.hostile or 0)
    return [f"--api-key={key_of(number)}" for number in range(n_keys)]


def asking(
    server: Served, inputs: Inputs, options: argparse.Namespace, end_s: float, tally: Tally
) -> list[threading.Thread]:
    has_bombs = options.hostile is None
    clients = (
        Client(server, number, inputs, tally, has_bombs=has_bombs)
        for number in range(options.clients)
    )
    threads = [threading.Thread(target=client.run, args=(end_s,)) for client in clients]
    for number in range(options.hostile or 0):
        threads += Hostile(server, options.clients + number, tally).threads(end_s)
    return threads


def soak(model: Path, pictures: list[str], options: argparse.Namespace) -> None:
    tally = Tally()
    seen: list[Seen] = []
    more = ("--cache-ram", options.cache_ram, "--parallel", options.parallel, *keys(options))
    with served(model, "--ctx", 2048, *more) as server:
        alone = [greedy(server.root, content, key_of(0)) for content in FIXED]
        began_s = time.monotonic()
        end_s = began_s + options.seconds
        threads = asking(server, Inputs(pictures, alone), options, end_s, tally)
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
    rng = random.Random(1)
    ends_s = [ended(model, pictures, options, rng) for _ in range(options.ends)]
    tally.lost += [f"ended only after {seconds:.1f} s" for seconds in ends_s if seconds > 10]
    percentiles = (50, 95) if tally.ttft_s else ()
    ttft_s = {
        f"p{each}": round(float(np.percentile(tally.ttft_s, each)), 2) for each in percentiles
    }
    if options.json:
        figures = {"turns": tally.turns, "lost": tally.lost, "ended_s": ended_s, "log": last_words}
        figures |= {"ttft_s": ttft_s, "hostile": tally.refused}
        figures["ends_s"] = [round(seconds, 2) for seconds in ends_s]
        print(json.dumps(figures | {"seen": [asdict(one) for one in seen]}))
    else:
        print(*(f"{n:6} {kind}" for kind, n in tally.turns.items()), sep="\n")
        print(f"{len(tally.lost):6} lost", *tally.lost, f"ended within {ended_s} s", sep="\n")
        print(f"TTFT in seconds, {len(tally.ttft_s)} streams: {ttft_s}")
        print(f"hostile requests by status: {dict(tally.refused)}")
        print(f"{len(ends_s)} others ended within {max(ends_s, default=0):.2f} s")
        for one in seen[:: max(1, len(seen) // 20)]:
            print(one)
    if tally.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
