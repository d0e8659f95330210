"""Record the requests of an agent that this program answers from a script. Not a test.

    python tests/bench/record_agent.py FOLDER SCRIPT.json [--port 9911]

Serves OpenAI's /v1/chat/completions and /v1/responses without a model, and writes each request's
body to FOLDER/NUMBER.PATH.json. SCRIPT.json is a list of answers, played in order: {"tool": NAME,
"args": {...}} calls a tool, {"text": TEXT} ends the turn. Requests without tools, such as those for
a title, get a fixed text. Point the agent's base URL at this server, for example opencode's
provider "@ai-sdk/openai-compatible" or Codex's wire_api "responses". replay_agent.py measures the
recording.
"""

import argparse
import itertools
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]
TITLE = {"text": "Title"}


class Recorder:
    """Writes requests to a folder and returns the script's answers."""

    def __init__(self, folder: Path, script: list[Json]) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self._script = iter(script)
        folder.mkdir(parents=True, exist_ok=True)

    def answer(self, path: str, body: bytes) -> tuple[int, Json]:
        """Record a request. Returns its number and its answer, the title's if the script ended."""
        number = next(self._numbers)
        name = f"{number:03d}.{path.strip('/').replace('/', '-')}.json"
        (self._folder / name).write_bytes(body)
        return number, next(self._script, TITLE) if json.loads(body).get("tools") else TITLE


def chat_events(number: int, answer: Json) -> list[Json]:
    """Return the chunks of a chat completion."""
    if "tool" in answer:
        function = {"name": answer["tool"], "arguments": json.dumps(answer["args"])}
        call = {"index": 0, "id": f"call_{number}", "type": "function", "function": function}
        delta, reason = {"role": "assistant", "tool_calls": [call]}, "tool_calls"
    else:
        delta, reason = {"role": "assistant", "content": answer["text"]}, "stop"
    head = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": 1}
    return [
        {**head, "model": "script", "choices": [{"index": 0, "delta": d, "finish_reason": r}]}
        for d, r in ((delta, None), ({}, reason))
    ]


def response_events(number: int, answer: Json) -> list[Json]:
    """Return the events of a response."""
    if "tool" in answer:
        item: Json = {"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}"}
        item |= {"name": answer["tool"], "arguments": json.dumps(answer["args"])}
    else:
        text = {"type": "output_text", "text": answer["text"], "annotations": []}
        item = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": [text]}
    item["status"] = "completed"
    response: Json = {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": 1,
        "model": "script",
    }
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    done = {**response, "status": "completed", "output": [item], "usage": usage}
    started = {**response, "status": "in_progress", "output": []}
    return [
        {"type": "response.created", "response": started},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": done},
    ]


def handler_of(recorder: Recorder) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # a list of models
            self._start("application/json")
            models = {"object": "list", "data": [{"id": "script", "object": "model"}]}
            self.wfile.write(json.dumps(models).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            number, answer = recorder.answer(self.path, body)
            is_chat = self.path.endswith("/chat/completions")
            events = (chat_events if is_chat else response_events)(number, answer)
            self._start("text/event-stream")
            for event in events:
                name = "" if is_chat else f"event: {event['type']}\n"
                self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
            if is_chat:
                self.wfile.write(b"data: [DONE]\n\n")

        def _start(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("script", type=Path)
    parser.add_argument("--port", type=int, default=9911)
    options = parser.parse_args()
    script = json.loads(options.script.read_text(encoding="utf-8"))
    recorder = Recorder(options.folder, script)
    HTTPServer(("127.0.0.1", options.port), handler_of(recorder)).serve_forever()


if __name__ == "__main__":
    main()
