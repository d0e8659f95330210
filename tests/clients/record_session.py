"""Record an agent's session between the agent and a server. Not a test.

    export PYTHONPATH=tests
    python tests/clients/record_session.py record RAW.jsonl http://127.0.0.1:8080 [--port 9911]
    python tests/clients/record_session.py trim RAW.jsonl tests/clients/sessions/AGENT.jsonl

`record` forwards each request to the server, and appends the request and the answer to RAW.jsonl.
Point the agent at http://127.0.0.1:9911/v1. `trim` keeps the requests' structure, the names and the
JSON schemas, and replaces prose by its length. It also replaces ids and paths, and drops answers.
support/agent_sessions.py reads the result.
"""

import argparse
import http.client
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.agent_sessions import REMOVED

HOP = {"connection", "transfer-encoding", "content-length", "host", "accept-encoding"}
# Keys of prose, and the maximum length of other texts that stay, such as names and patterns.
PROSE, SHORT = {"content", "description", "instructions", "output", "text", "title"}, 60
# Texts of the task and of the model's answers stay if they are not too long for that.
OURS, LONG = "hello.py", 200
IDS = re.compile(r"\b(?:[a-z]+_)?[0-9a-f]{8}(?:-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\b")
PATHS = re.compile(r"(?:/tmp|/root|/home)/[\w./@+-]*")


def forwarding(file: Path, root: str) -> type[BaseHTTPRequestHandler]:
    address = urlsplit(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            self._forward(b"")

        def do_POST(self) -> None:
            self._forward(self.rfile.read(int(self.headers.get("content-length", 0))))

        def _forward(self, body: bytes) -> None:
            started_s = time.monotonic()
            link = http.client.HTTPConnection(address.hostname or "", address.port, timeout=3600)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
            link.request(self.command, self.path, body, headers)
            answer = link.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.end_headers()
            said, first_s = b"", None
            while piece := answer.read1(65536):
                first_s = first_s or time.monotonic() - started_s
                said += piece
                self.wfile.write(piece)
                self.wfile.flush()
            kept = {
                "path": self.path,
                "status": answer.status,
                "first_s": round(first_s or 0.0, 2),
                "seconds": round(time.monotonic() - started_s, 2),
                "body": json.loads(body) if body else None,
                "answer": said.decode(errors="replace"),
            }
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(kept) + "\n")

        def log_message(self, *_: object) -> None:
            return

    return Handler


def trimmed(value: Any, name: str = "") -> Any:
    """Return a copy of a request's part. `name`: its key."""
    if isinstance(value, dict):
        return {key: trimmed(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [trimmed(each, name) for each in value]
    if not isinstance(value, str):
        return value
    text = PATHS.sub("/project", IDS.sub("00000000-0000-4000-8000-000000000000", value))
    is_ours = name == "arguments" or (OURS in text and len(text) < LONG)
    is_kept = is_ours or (len(text) <= SHORT and name not in PROSE)
    return text if is_kept else {REMOVED: len(text)}


def trim(raw: Path, out: Path) -> None:
    lines = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    with out.open("w", encoding="utf-8") as file:
        for line in lines:
            if line["body"] is not None:
                # Codex describes the machine here.
                line["body"].pop("client_metadata", None)
                kept = {"path": line["path"], "body": trimmed(line["body"])}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["record", "trim"])
    parser.add_argument("raw", type=Path)
    parser.add_argument("other", help="the server's address, or the trimmed file")
    parser.add_argument("--port", type=int, default=9911)
    options = parser.parse_args()
    if options.action == "trim":
        trim(options.raw, Path(options.other))
    else:
        handler = forwarding(options.raw, options.other)
        ThreadingHTTPServer(("127.0.0.1", options.port), handler).serve_forever()


if __name__ == "__main__":
    main()
