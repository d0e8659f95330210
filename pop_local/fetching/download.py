"""One file over HTTP: resumed where it stopped, checked, and only then given its name.

What has arrived lies in NAME.gguf.partial; NAME.gguf.partial.origin says what it is a part of.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from converter.errors import FormatError, PopError
from converter.header import MAGIC
from pop_local.fetching.reasons import reason_of
from pop_local.fetching.target import alone, require_space
from pop_local.models.stored import ORIGIN_SUFFIX

if TYPE_CHECKING:
    import requests

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = (15, 60)  # to connect, between two pieces
_MAX_FAILURES = 3  # in a row, without a byte between them
_PAUSE_S = 1.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_AGAIN = "check the network and run this again: it goes on with what has arrived"


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    `identity` says what it is, also when its address changes; "" takes the address. `headers` go to
    the address' own host only. `sha256` is "" when nobody knows it.
    """

    url: str
    identity: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""


@dataclass(frozen=True)
class _Origin:
    """What a partial file is a part of.

    `validator` is the server's strong ETag or its date. `identity` is hashed, since addresses may
    hold secrets.
    """

    identity: str
    validator: str
    total_bytes: int


def without_secrets(url: str) -> str:
    """Return the address without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _Dropped(Exception):  # noqa: N818 (never leaves this module)
    """The connection broke or the server is busy: worth another try."""


def download(remote: Remote, target: Path, advance: Callable[[int, int], None]) -> None:
    """Fetch `remote` to `target`, replacing what is there; the folder must exist.

    `advance` gets (done_bytes, total_bytes), the total being 0 when the server does not say.
    Raises PopError; what has arrived is kept when the network fails or the user interrupts.
    """
    transfer = _Transfer(remote, target, advance)
    with alone(target):
        try:
            transfer.run()
        except BaseException:
            transfer.forget_if_empty()
            raise
        transfer.finish()


class _Transfer:
    def __init__(self, remote: Remote, target: Path, advance: Callable[[int, int], None]) -> None:
        self._remote, self._target, self._advance = remote, target, advance
        self._partial = target.with_name(f"{target.name}.partial")
        self._origin_file = target.with_name(self._partial.name + ORIGIN_SUFFIX)
        self._identity = hashlib.sha256((remote.identity or remote.url).encode()).hexdigest()
        self._sha256 = ""

    def run(self) -> None:
        import requests

        with requests.Session() as session:
            failures = 0
            while True:
                before = self._size()
                try:
                    self._attempt(session)
                    return
                except _Dropped as dropped:
                    failures = 1 if self._size() > before else failures + 1
                    if failures > _MAX_FAILURES:
                        raise PopError(f"{self._where()}: {dropped}", _AGAIN) from dropped
                time.sleep(_PAUSE_S)

    def finish(self) -> None:
        sha256 = self._remote.sha256
        if sha256 and self._sha256 != sha256:
            self._forget()
            raise PopError(
                f"what {self._where()} sent for {self._target.name} is damaged or another file:"
                f" its sha256 is {self._sha256}, not {sha256}",
                "nothing was kept; run it again, and compare the hash with its publisher's",
            )
        self._partial.replace(self._target)
        self._origin_file.unlink(missing_ok=True)

    def forget_if_empty(self) -> None:
        if self._size() == 0:
            self._forget()

    def _forget(self) -> None:
        for path in (self._partial, self._origin_file):
            with suppress(OSError):
                path.unlink()

    def _size(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _where(self) -> str:
        return urlsplit(self._remote.url).hostname or self._shown()

    def _shown(self) -> str:
        return without_secrets(self._remote.url)

    def _attempt(self, session: "requests.Session") -> None:
        import requests

        origin = self._origin()
        start = self._size() if origin else 0
        if origin and start and start == origin.total_bytes:
            self._sha256 = self._hashed(start).hexdigest()
            return
        headers = {"Accept-Encoding": "identity", **self._remote.headers}
        if origin and start:
            headers["Range"] = f"bytes={start}-"
            if origin.validator:
                headers["If-Range"] = origin.validator
        try:
            with session.get(
                self._remote.url,
                headers=headers,
                # With a token of its own, none of ~/.netrc.
                auth=_as_it_is if "authorization" in headers else None,
                stream=True,
                timeout=_TIMEOUT_S,
            ) as response:
                self._receive(response, start)
        # The texts of requests' errors are not shown: they may hold the address' query.
        except requests.exceptions.SSLError as error:
            raise PopError(
                f"no safe connection to {self._where()}: {reason_of(error)}",
                "check the clock, and the certificates (REQUESTS_CA_BUNDLE)",
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _Dropped("the connection failed or broke off") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _Dropped("the connection broke off") from error
        except requests.RequestException as error:
            raise PopError(
                f"{self._shown()} cannot be fetched ({type(error).__name__})", "check the address"
            ) from error

    def _receive(self, response: "requests.Response", start: int) -> None:
        if response.status_code == 416:
            self._forget()  # no part of what the server has now
            raise _Dropped("the file changed on the server")
        self._check_status(response)
        if response.status_code != 206:
            start = 0
        elif not _begins_at(response, start):
            self._forget()
            raise _Dropped("the server sent another part than was asked for")
        total = start + int(response.headers.get("Content-Length") or 0)
        total = total if "Content-Length" in response.headers else 0
        require_space(self._target.parent, total - start, self._target.name)
        self._write_origin(response, total)
        digest = self._hashed(start)
        with self._partial.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            done = start
            for chunk in response.iter_content(_CHUNK_BYTES):
                if done == 0:
                    self._check_magic(response, chunk)
                file.write(chunk)
                file.flush()
                digest.update(chunk)
                done += len(chunk)
                self._advance(done, total)
        if done < total:  # which not every version of requests notices
            raise _Dropped("the connection broke off")
        if done == 0:
            raise FormatError(f"{self._shown()} is empty", "check the address")
        self._sha256 = digest.hexdigest()

    def _hashed(self, n_bytes: int) -> "hashlib._Hash":
        """Hash what arrived in an earlier attempt; the rest is hashed while it arrives."""
        digest = hashlib.sha256()
        if n_bytes:
            with self._partial.open("rb") as file:
                while n_bytes and (chunk := file.read(min(n_bytes, 1 << 20))):
                    digest.update(chunk)
                    n_bytes -= len(chunk)
        return digest

    def _check_status(self, response: "requests.Response") -> None:
        code = response.status_code
        if code in _BUSY:
            raise _Dropped(f"the server answers {code} {response.reason}")
        if code in (401, 403):
            raise PopError(
                f"{self._where()} does not let you have {self._target.name} ({code})",
                "check that you have access to it, or fetch it another way",
            )
        if code in (404, 410):
            raise PopError(f"there is nothing at {self._shown()}", "check the address")
        if code >= 400 or code not in (200, 206):
            raise PopError(
                f"{self._where()} answers {code} {response.reason} for {self._target.name}",
                "check the address",
            )

    def _check_magic(self, response: "requests.Response", chunk: bytes) -> None:
        if chunk[:4] == MAGIC:
            return
        self._forget()
        kind = response.headers.get("Content-Type", "")
        what = "a web page" if kind.startswith("text/html") else "no GGUF file"
        raise FormatError(
            f"what {self._shown()} sends is {what}",
            "give the address of the file itself (NAME.gguf), or hf:OWNER/REPO for a hub",
        )

    def _origin(self) -> _Origin | None:
        """Return the origin of a partial file that can be gone on with."""
        try:
            origin = _Origin(**json.loads(self._origin_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        # Without hash or validator nobody could tell whether the two halves belong together.
        fits = origin.identity == self._identity and (origin.validator or self._remote.sha256)
        return origin if fits else None

    def _write_origin(self, response: "requests.Response", total: int) -> None:
        etag = response.headers.get("ETag", "")
        strong = "" if etag.startswith("W/") else etag
        origin = _Origin(self._identity, strong or response.headers.get("Last-Modified", ""), total)
        self._origin_file.write_text(json.dumps(vars(origin)), encoding="utf-8")


def _as_it_is(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    return request


def _begins_at(response: "requests.Response", start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
