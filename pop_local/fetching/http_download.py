"""Download a GGUF file from a URL, with resumption and checks.

An unfinished download is stored as NAME.gguf.partial. The file NAME.gguf.partial.origin identifies
the complete file.
"""

import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pop_converter.base.errors import FormatError, PopError, TruncatedError
from pop_converter.base.progress import Progress
from pop_converter.gguf.header import MAGIC, read_header
from pop_local.fetching.target import (
    download_lock,
    file_sha256,
    is_fetched,
    require_space,
    safe_name,
)
from pop_local.models.model_files import ORIGIN_SUFFIX, SUFFIX

if TYPE_CHECKING:
    import requests

_CHUNK_BYTES = 1 << 16
# Disk space required in advance if the server does not report a file's size.
_UNANNOUNCED_BYTES = 256 << 20
_TIMEOUT_S = (15, 60)  # for the connection, and between chunks
_MAX_FAILURES = 3  # consecutive failures without a new byte
_PAUSE_S = 1.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_AGAIN = "check the network and try again"
_RESUMES = ": the download will resume"


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with the properties that are known before the download.

    `identity` is the same for all temporary URLs of a file (default: `url`). `headers` are only
    sent to the URL's host. `sha256` is "" if unknown. `name` and `size_bytes` are as reported by
    the hub.
    """

    url: str
    identity: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    name: str = ""
    size_bytes: int = 0


def without_secrets(url: str) -> str:
    """Return the URL without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def reason_of(error: BaseException) -> str:
    """Return the reason from OpenSSL or the operating system, else the error's class name."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return cause.reason.replace("_", " ").lower()
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def fetch_url(url: str, folder: Path, sha256: str, advance: Progress, *, force: bool) -> Path:
    """Download the file at `url` into `folder`, and return its path.

    `sha256` may be "". An existing file with the hash `sha256` is kept. Raises OutputExistsError
    for any other existing file, unless `force` is true. `advance` is called with (done_bytes,
    total_bytes). Raises PopError.
    """
    target = folder / file_name(url)
    if is_fetched(target, sha256, "the requested file", force=force):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    download(RemoteFile(url, sha256=sha256), target, advance)
    return target


def file_name(url: str) -> str:
    """Return the URL's file name, with unsafe characters replaced.

    Raises PopError for an invalid URL, and for a URL without host or file name.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # its message may contain a password
        raise PopError("invalid URL", "pass the full URL of a GGUF file") from error
    if not parts.hostname:
        raise PopError(f"{without_secrets(url)} has no host", "pass the full URL of a GGUF file")
    name = safe_name(PurePosixPath(unquote(parts.path)).name)
    if not name:
        raise PopError(
            f"{without_secrets(url)} has no file name",
            "pass the URL of a GGUF file (.../NAME.gguf)",
        )
    return name if name.lower().endswith(SUFFIX) else name + SUFFIX


class _Dropped(Exception):  # noqa: N818 (never leaves this module)
    """A broken connection or a busy server, after which the download is retried."""


def download(remote: RemoteFile, target: Path, advance: Progress) -> None:
    """Download `remote` to `target`, whose folder must exist, and replace an existing file.

    `advance` is called with (done_bytes, total_bytes), with 0 for an unknown total. After a network
    failure or an interruption, the received bytes are kept. Raises PopError.
    """
    with download_lock(target):
        _Transfer(remote, target, advance).run()


class _Transfer:
    def __init__(self, remote: RemoteFile, target: Path, advance: Progress) -> None:
        self._remote, self._target, self._advance = remote, target, advance
        self._partial = target.with_name(f"{target.name}.partial")
        self._origin_file = target.with_name(self._partial.name + ORIGIN_SUFFIX)
        self._identity = hashlib.sha256((remote.identity or remote.url).encode()).hexdigest()
        self._shown = without_secrets(remote.url)
        self._where = urlsplit(remote.url).hostname or self._shown

    def run(self) -> None:
        import requests

        try:
            with requests.Session() as session:
                session.hooks["response"].append(self._require_unpacked)
                self._fetch(session)
            self._check()
            with self._partial.open("r+b") as file:
                os.fsync(file.fileno())
            self._partial.replace(self._target)
        finally:
            if self._size() == 0:  # nothing received, or already renamed
                self._forget()

    def kept_bytes(self) -> int:
        _, total = self._origin()
        return self._size() if total else 0

    def _fetch(self, session: "requests.Session") -> None:
        failures, most = 0, self._size()
        while True:
            try:
                self._attempt(session)
                return
            except _Dropped as dropped:
                failures = 1 if self._size() > most else failures + 1
                most = max(most, self._size())
                if failures > _MAX_FAILURES:
                    hint = _AGAIN + _RESUMES * bool(self.kept_bytes())
                    raise PopError(f"{self._where}: {dropped}", hint) from dropped
            time.sleep(_PAUSE_S)

    def _forget(self) -> None:
        for path in (self._partial, self._origin_file):
            with suppress(OSError):
                path.unlink()

    def _size(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _attempt(self, session: "requests.Session") -> None:
        import requests

        headers = {"Accept-Encoding": "identity", **self._remote.headers}
        validator, total = self._origin()
        start = self._size() if total else 0
        if start:
            if start == total:
                return
            headers["Range"] = f"bytes={start}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with session.get(
                self._remote.url,
                headers=headers,
                # The header's token takes precedence over ~/.netrc.
                auth=(lambda request: request) if "authorization" in headers else None,
                stream=True,
                timeout=_TIMEOUT_S,
            ) as response:
                self._receive(response, start)
        # The messages of requests' errors are not shown, since they may contain the URL's query.
        except requests.exceptions.SSLError as error:
            raise PopError(
                f"no secure connection to {self._where}: {reason_of(error)}",
                "check the system's clock and the CA certificates (REQUESTS_CA_BUNDLE)",
            ) from error
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            raise _Dropped("the connection failed or broke off") from error
        except (requests.RequestException, ValueError) as error:  # ValueError: from urllib3
            raise PopError(
                f"{self._shown} cannot be fetched ({type(error).__name__})", "check the URL"
            ) from error

    def _require_unpacked(self, response: "requests.Response", **_: object) -> None:
        """Raise PopError for a compressed reply, which could expand without limit."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity" and response.status_code < 400:
            raise PopError(
                f"the server sends {self._shown} with compression ({encoding})",
                "download the file from another URL",
            )

    def _receive(self, response: "requests.Response", requested: int) -> None:
        self._check_status(response)
        start, total = _extent(response)
        if start not in (0, requested):
            self._forget()
            raise _Dropped("the server did not send the requested part of the file")
        validator = _validator(response)
        if start:
            validator = self._of_the_same(validator, total)
        require_space(self._target.parent, total - start, self._target.name)
        chunks = response.iter_content(_CHUNK_BYTES)
        # The start is checked first, so that a web page does not replace the partial file.
        first = [] if start else [self._beginning(response, chunks, total)]
        self._write_origin(validator, total)
        with self._partial.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            done = checked_at = start
            for chunk in chain(first, chunks):
                if total == 0 and done >= checked_at:
                    require_space(self._target.parent, _UNANNOUNCED_BYTES, self._target.name)
                    checked_at = done + _UNANNOUNCED_BYTES
                file.write(chunk)
                file.flush()
                done += len(chunk)
                self._advance(done, total)
        if done < total:
            raise _Dropped("the connection broke off")

    def _of_the_same(self, validator: str, total: int) -> str:
        """Return the partial file's validator. Raises _Dropped if the file on the server has
        changed.

        If a server ignores If-Range or sends no validator, only the final hash reveals a change.
        """
        before, total_before = self._origin()
        if total != total_before or (validator and before and validator != before):
            self._forget()
            raise _Dropped("the file changed on the server")
        return before

    def _beginning(
        self, response: "requests.Response", chunks: Iterator[bytes], total: int
    ) -> bytes:
        """Read the first chunks of a GGUF file. Raises FormatError for a file in another format."""
        begun = b""
        for chunk in chunks:
            begun += chunk
            if len(begun) >= len(MAGIC) or not MAGIC.startswith(begun):
                break
        if begun.startswith(MAGIC):
            return begun
        if MAGIC.startswith(begun) and len(begun) < total:
            raise _Dropped("the connection broke off")
        if not begun:
            raise FormatError(f"{self._shown} is empty", "check the URL")
        kind = response.headers.get("Content-Type", "")
        what = "a web page" if kind.startswith("text/html") else "not a GGUF file"
        raise FormatError(
            f"{self._shown} is {what}",
            "pass the URL of the GGUF file itself, or hf:OWNER/REPO for a Hugging Face repository",
        )

    def _check_status(self, response: "requests.Response") -> None:
        code = response.status_code
        if code in (200, 206):
            return
        if code == 416:
            self._forget()  # the server's file is shorter
            raise _Dropped("the file changed on the server")
        if code in _BUSY:
            raise _Dropped(f"the server returned HTTP status {code} {response.reason}")
        message = (
            f"{self._where} returned HTTP status {code} {response.reason} for {self._target.name}"
        )
        hint = "check the URL"
        if code in (401, 403):
            message = f"{self._where} denies access to {self._target.name} ({code})"
            hint = "check that you have access to this file, or download it with a browser"
        elif code in (404, 410):
            message = f"{self._shown} does not exist"
        raise PopError(message, hint)

    def _check(self) -> None:
        """Check the hash, and also the header, since a server may report a wrong length."""
        sha256 = self._remote.sha256
        if sha256 and (found := file_sha256(self._partial)) != sha256:
            self._forget()
            raise PopError(
                f"{self._where} sent a damaged or different file for {self._target.name}:"
                f" its sha256 is {found}, not {sha256}",
                "the download was deleted: try again, and compare the hash with the publisher's",
            )
        try:
            read_header(self._partial)
        except TruncatedError as error:
            self._forget()
            what = error.message.removeprefix(f"{self._partial} ")
            raise FormatError(f"the file from {self._shown} {what}", "try again") from error
        except FormatError:
            return  # the file may have a newer format

    def _origin(self) -> tuple[str, int]:
        """Return the partial file's validator and the complete size, 0 if it cannot be resumed."""
        try:
            identity, validator, total = json.loads(self._origin_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return "", 0
        # Without a hash or validator, a resumed file may join parts of two files.
        fits = identity == self._identity and (validator or self._remote.sha256)
        return (validator, total) if fits else ("", 0)

    def _write_origin(self, validator: str, total: int) -> None:
        """Store the partial file's origin as a hash, since URLs may contain secrets."""
        origin = (self._identity, validator, total)
        self._origin_file.write_text(json.dumps(origin), encoding="utf-8")


def _validator(response: "requests.Response") -> str:
    """Return the reply's strong ETag, else its time of the last change, else ""."""
    etag = response.headers.get("ETag", "")
    return etag if etag[:2] not in ("", "W/") else response.headers.get("Last-Modified", "")


def _extent(response: "requests.Response") -> tuple[int, int]:
    """Return the position of the reply's bytes in the file, and the file's size (0 if unknown)."""
    if response.status_code == 206:
        extent = response.headers.get("Content-Range", "")
        part = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", extent)
        return (int(part[1]), int(part[2])) if part else (-1, 0)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else 0
