"""A small server that behaves like a hub: model info, redirects, ranges, refusals.

As on the hub, /OWNER/REPO/resolve/COMMIT/FILE redirects to another host name, which serves the
bytes. `drops` lists the numbers of bytes after which the next downloads lose their connection.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repo:
    """A repository; `token` grants access, `gated` restricts access to its files."""

    files: dict[str, bytes]
    token: str = ""
    gated: bool = False
    in_git: bool = False
    license: str = "apache-2.0"


@dataclass
class Hub:
    port: int = 0
    repos: dict[str, Repo] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)
    busy: int = 0
    requests: list[Request] = field(default_factory=list)
    # Headers that the file host adds or overrides.
    headers: dict[str, str] = field(default_factory=dict)
    ignores_ranges: bool = False
    # The host that all requests are redirected to ("": none).
    redirects_to: str = ""
    # Raw replies, each followed by a closed connection; regular replies come after them.
    raw: list[bytes] = field(default_factory=list)
    # Bytes after which one response stalls until the server stops (0: none).
    stall: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str) -> str:
        return f"{self.endpoint}/plain/{quote(name)}"

    def downloads(self) -> list[Request]:
        """Return the requests for file contents."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and request.path.startswith(("/plain/", "/cdn/"))
        ]

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process's client, which has already read its environment, to this hub."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client was interrupted
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are written separately

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        return

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, path, headers))
        if self.hub.raw:
            self.wfile.write(self.hub.raw.pop(0))
            self.close_connection = True
        elif self.hub.redirects_to:
            self._send(302, b"", {"Location": self.hub.redirects_to})
        elif path.startswith("/plain/"):
            name = path.removeprefix("/plain/")
            if name not in self.hub.plain:
                self._send(404, b"not here", {})
            else:
                self._bytes(self.hub.plain[name])
        elif path.startswith("/cdn/"):
            self._bytes(self._by_hash(path.removeprefix("/cdn/")))
        elif path.startswith("/api/models/"):
            self._info(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._resolve(repo, rest.partition("/")[2])
        else:
            self._refuse(404, "EntryNotFound", "not here")

    def _by_hash(self, sha256: str) -> bytes:
        files = [file for repo in self.hub.repos.values() for file in repo.files.values()]
        return next(file for file in files if _sha256(file) == sha256)

    def _info(self, name: str) -> None:
        repo = self._open(name, for_files=False)
        if repo is None:
            return
        siblings = [
            {"rfilename": file, "size": len(content), "blobId": "0" * 40}
            | ({} if repo.in_git else {"lfs": _lfs(content)})
            for file, content in repo.files.items()
        ]
        info = {
            "_id": "0" * 24,
            "id": name,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "private": False,
            "downloads": 0,
            "likes": 0,
            "cardData": {"license": repo.license},
        }
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, file: str) -> None:
        repo = self._open(name, for_files=True)
        if repo is None:
            return
        if file not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = repo.files[file]
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "ETag": '"pointer"'}
        headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{_sha256(content)}"}
        self._send(302, b"", headers)

    def _open(self, name: str, *, for_files: bool) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:  # The hub answers 401 to hide the names of private repositories.
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        if self.headers.get("Authorization") == f"Bearer {repo.token}" or not repo.token:
            return repo
        if repo.gated and for_files:
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted")
            return None
        if repo.gated:
            return repo
        self._refuse(401, "RepoNotFound", "Repository not found")
        return None

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._send(code, b"", {"X-Error-Code": kind, "X-Error-Message": message})

    def _bytes(self, content: bytes) -> None:
        if self.hub.busy:
            self.hub.busy -= 1
            self._send(503, b"", {})
            return
        headers = {"ETag": f'"{_sha256(content)[:16]}"', "Content-Type": "binary/octet-stream"}
        headers |= self.hub.headers
        start = self._start(headers["ETag"])
        if start >= len(content) > 0:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if start:
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers = {"Content-Range": whole} | headers
        self._send(206 if start else 200, content[start:], headers)

    def _start(self, etag: str) -> int:
        byte_range = self.headers.get("Range", "")
        fits = self.headers.get("If-Range", etag) == etag
        if not byte_range or not fits or self.hub.ignores_ranges:
            return 0
        return int(byte_range.removeprefix("bytes=").removesuffix("-"))

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if body and self.hub.stall and "ETag" in headers:
            stall, self.hub.stall = self.hub.stall, 0
            self.wfile.write(body[:stall])
            self.hub.stopped.wait()
            self.close_connection = True
            return
        if body and self.hub.drops and "ETag" in headers:
            self.wfile.write(body[: self.hub.drops.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _lfs(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": _sha256(content), "pointerSize": 134}
