"""The honest and the hostile clients of measure_soak.py."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from shared import BOMB, Served

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
FIXED = [f"Fixed {number}. {STORY * (1 + number)}" for number in range(6)]
SETTLING_S = 30  # an upload takes 20 s, and up to six bombs of 3 s may be queued
OTHER = "another answer than a lone client's"


@dataclass(frozen=True)
class Phases:
    """Periods with and without attacks, in turn; the first one has no attacks. In seconds."""

    began_s: float
    hostile_s: float
    quiet_s: float

    def at(self, moment_s: float) -> str:
        """Return the phase; "settling" is the time in which the last attacks end."""
        within_s = (moment_s - self.began_s) % (self.quiet_s + self.hostile_s)
        if within_s >= self.quiet_s:
            return "hostile"
        is_first = moment_s - self.began_s < self.quiet_s
        return "quiet" if is_first or within_s > SETTLING_S else "settling"


@dataclass
class Tally:
    """The answers to all clients; `lost` describes the wrong ones."""

    turns: Counter[str] = field(default_factory=Counter)
    ttft_s: list[tuple[float, float]] = field(default_factory=list)  # start of the stream, TTFT
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
        self._root, self._inputs = server.root, inputs
        self._key, self._tally = key_of(number), tally
        self._api = openai.OpenAI(
            base_url=server.api, api_key=self._key, max_retries=0, timeout=300
        )
        self._rng = random.Random(number)
        self._number = number
        # With their shares, in percent.
        self._kinds = {
            "whole": (self._whole, 10),
            "as alone": (self._as_alone, 5 if inputs.alone else 0),
            "streamed": (self._streamed, 15),
            "in full": (self._in_full, 8),
            "log probabilities": (self._logprobs, 7),
            "tools": (self._tools, 10),
            "tools, streamed": (self._streamed_tools, 10),
            "messages": (self._message, 5),
            "responses": (self._response, 5),
            "ollama": (self._ollama, 5),
            "pictures": (self._picture, 10 if inputs.pictures else 0),
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
        return mark if is_as_alone(self._root, self._inputs, self._key, self._rng) else OTHER

    def _streamed(self, request: dict[str, Any], mark: str) -> str:
        began_s, text = time.monotonic(), ""
        for piece in self._ask(request, mark, stream=True):
            said = piece.choices[0].delta.content or ""
            if said and not text:
                self._tally.ttft_s.append((began_s, time.monotonic() - began_s))
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
        url = {"type": "image_url", "image_url": {"url": self._rng.choice(self._inputs.pictures)}}
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

    def threads(self, end_s: float, phases: Phases) -> list[threading.Thread]:
        kinds = [*[self._compile] * 6, *[self._upload] * 6, self._hang_up]
        return [threading.Thread(target=self._repeat, args=(kind, end_s, phases)) for kind in kinds]

    def _repeat(self, kind: Any, end_s: float, phases: Phases) -> None:
        rng = random.Random(0)
        while (now_s := time.monotonic()) < end_s:
            if phases.at(now_s) != "hostile":
                time.sleep(0.1)
                continue
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


def is_as_alone(root: str, inputs: Inputs, key: str, rng: random.Random) -> bool:
    """Return whether the greedy answer to a fixed prompt is a lone client's."""
    number = rng.randrange(len(FIXED))
    return greedy(root, FIXED[number], key) == inputs.alone[number]
