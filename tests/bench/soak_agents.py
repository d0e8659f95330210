"""The replayed coding agents of measure_soak.py."""

import json
import random
import time
from collections.abc import Generator, Iterator
from typing import Any

import httpx2

from shared import SESSIONS, Served, requests_of
from soak_clients import Inputs, Tally, is_as_alone, key_of, sent

PATIENCE_S = 900
N_ANSWER = 48
FILLERS = (100, 300, 1000)  # characters, for prompts of 60 to 6,000 tokens
MAX_PAUSE_S = 3.0  # an agent runs its tools between two requests
SHARE_HUNG_UP = 0.1
MARK = "agent"  # a property that each tool gets


class Replayed:
    """A coding agent that sends recorded sessions again and again, and checks each answer.

    Each request asks for JSON with its own mark, and each tool gets a constant argument with the
    agent's key. The server must therefore return one of them, and an answer to another request or
    client would differ. The prompts of a request that is sent again must have the same length.
    """

    def __init__(self, server: Served, number: int, inputs: Inputs, tally: Tally) -> None:
        self._root, self._key, self._tally = server.root, key_of(number), tally
        self._inputs, self._number, self._rng = inputs, number, random.Random(number)
        self._lengths: dict[tuple[str, int, int], int] = {}  # prompt tokens

    def run(self, end_s: float) -> None:
        n_sessions = 0
        while time.monotonic() < end_s:
            n_sessions += 1
            file, most = self._rng.choice(SESSIONS), self._rng.choice(FILLERS)
            requests = requests_of(file, most)
            for index, (path, body) in enumerate(requests):
                mark = f"agent {self._number} session {n_sessions} request {index}"
                n_first = len(_turns(_first_like(requests, body)))
                marked = self._marked(body, mark, n_first, f" Task {n_sessions:05d}.")
                try:
                    got = self._answer(path, marked, mark, (file.stem, most, index))
                except Exception as error:
                    got = repr(error)
                self._tally.add(file.stem, mark, got)
                if time.monotonic() >= end_s:
                    return
                time.sleep(self._rng.uniform(0, MAX_PAUSE_S))
            self._check_alone(f"agent {self._number} session {n_sessions}")

    def _marked(self, body: dict[str, Any], mark: str, n_first: int, task: str) -> dict[str, Any]:
        """Return the request with its mark, and a new task in the conversation's first prompt."""
        body = json.loads(json.dumps(body))
        _append(_turns(body)[n_first - 1], task)
        for tool in body.get("tools", []):
            function = tool.get("function", tool)
            if schema := function.get("parameters"):
                properties = {MARK: {"const": self._key}} | schema.get("properties", {})
                required = [MARK, *schema.get("required", [])]
                schema |= {"properties": properties, "required": required}
        form = {"name": "a", "schema": {"const": mark}}
        if "input" in body:
            text = {"format": {"type": "json_schema", **form}}
            return body | {"text": text, "max_output_tokens": N_ANSWER}
        body.pop("max_completion_tokens", None)
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        form = {"type": "json_schema", "json_schema": form}
        return body | {"response_format": form, "max_tokens": N_ANSWER}

    def _answer(
        self, path: str, body: dict[str, Any], mark: str, request: tuple[str, int, int]
    ) -> str:
        """Return the mark if the answer belongs to the request, or else a description."""
        if body.get("stream") and self._rng.random() < SHARE_HUNG_UP:
            events = self._events(path, body)
            for _ in range(self._rng.randint(1, 4)):
                next(events)
            events.close()
            self._tally.add("hung up", mark, mark)
        texts, usage = self._texts(path, body)
        n_prompt = usage["input_tokens" if "input" in body else "prompt_tokens"]
        if self._lengths.setdefault(request, n_prompt) != n_prompt:
            return f"{n_prompt} prompt tokens instead of {self._lengths[request]}"
        if not texts:
            return "no answer"
        # The token limit may truncate a call after its first argument.
        call = f'{{"{MARK}":{json.dumps(self._key)}'
        for text in texts:
            is_call = "".join(text.split()).startswith(call)
            if not is_call and text.strip() != json.dumps(mark):
                return f"another answer: {text[:100]!r}"
        return mark

    def _texts(self, path: str, body: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Return the answer's text and its tool calls' arguments, and the usage."""
        if not body.get("stream"):
            answer = httpx2.post(
                self._root + path, json=body, timeout=PATIENCE_S, headers=sent(self._key)
            )
            answer.raise_for_status()
            whole = answer.json()
            return _texts_of(whole["choices"][0]["message"]), whole["usage"]
        found: dict[Any, str] = {}
        usage: dict[str, Any] = {}
        began_s, is_waiting = time.monotonic(), True
        for event in self._events(path, body):
            if response := event.get("response"):
                usage = response.get("usage") or usage
            usage = event.get("usage") or usage
            for key, text in _pieces(event):
                if is_waiting:
                    self._tally.ttft_s.append((began_s, time.monotonic() - began_s))
                    is_waiting = False
                found[key] = found.get(key, "") + text
        return [text for text in found.values() if text], usage

    def _events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        with httpx2.stream(
            "POST", self._root + path, json=body, timeout=PATIENCE_S, headers=sent(self._key)
        ) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.read().decode()[:200]}")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def _check_alone(self, mark: str) -> None:
        kind, got = "as alone", mark
        try:
            if not is_as_alone(self._root, self._inputs, self._key, self._rng):
                kind = "other than alone"
        except Exception as error:
            got = repr(error)
        self._tally.add(kind, mark, got)


def _turns(body: dict[str, Any]) -> list[dict[str, Any]]:
    return body.get("messages") or body["input"]


def _first_like(requests: list[tuple[str, dict[str, Any]]], body: dict[str, Any]) -> dict[str, Any]:
    """Return the first request of the conversation that a request continues."""
    turns = _turns(body)
    return next(each for _, each in requests if _turns(each) == turns[: len(_turns(each))])


def _append(turn: dict[str, Any], text: str) -> None:
    content = turn["content"]
    if isinstance(content, str):
        turn["content"] = content + text
    else:
        content.append({"type": content[-1]["type"], "text": text})


def _texts_of(message: dict[str, Any]) -> list[str]:
    calls = message.get("tool_calls") or []
    texts = [message.get("content") or "", *(call["function"]["arguments"] for call in calls)]
    return [text for text in texts if text]


def _pieces(event: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield the pieces of texts and of calls' arguments, each with a key of its text or call."""
    kind = event.get("type", "")
    if kind in ("response.output_text.delta", "response.function_call_arguments.delta"):
        yield event["item_id"], event["delta"]
    for choice in event.get("choices", []):
        delta = choice["delta"]
        if text := delta.get("content"):
            yield "text", text
        for call in delta.get("tool_calls") or []:
            yield call["index"], call["function"].get("arguments") or ""
