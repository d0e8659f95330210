"""Download a GGUF file from a URL, resume interrupted downloads, and verify the file.

An unfinished download is stored as NAME.gguf.partial. NAME.gguf.partial.origin identifies the file
that is being downloaded.
"""

import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Mapping
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
# Free disk space to keep while downloading a file of unknown size.
_UNANNOUNCED_BYTES = 256 << 20
_TIMEOUT_S = (15, 60)  # to connect, and between chunks
_MAX_FAILURES = 3  # consecutive failures without a new byte
_PAUSE_S = 1.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CHANGED = "the file on the server changed, or the server sent the wrong part of the file"
_BROKE_OFF = "the connection failed or was interrupted"


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with the properties that are known before the download.

    `headers` are sent only to the URL's host. `sha256` is "" if unknown. `name` and `size_bytes`
    are the values reported by the hub.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    name: str = ""
    size_bytes: int = 0


def _without_secrets(url: str) -> str:
    """Return the URL without the user name, password, and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def reason_of(error: BaseException) -> str:
    """Return the reason given by OpenSSL or the operating system, or else the error's class name.

    The full error message could contain secrets from a URL.
    """
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

    `sha256` may be "". An existing file with this hash is kept. Raises OutputExistsError if a
    different file exists, unless `force` is true. `advance` is called with (done_bytes,
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

    Raises PopError if the URL is invalid or lacks a host or a file name.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # its message may contain a password
        raise PopError("invalid URL", "pass the full URL of a GGUF file") from error
    if not parts.hostname:
        raise PopError(f"{_without_secrets(url)} has no host", "pass the full URL of a GGUF file")
    name = safe_name(PurePosixPath(unquote(parts.path)).name)
    if not name:
        raise PopError(
            f"{_without_secrets(url)} has no file name",
            "pass the URL of a GGUF file (.../NAME.gguf)",
        )
    return name if name.lower().endswith(SUFFIX) else name + SUFFIX


class _Dropped(Exception):  # noqa: N818 (never leaves this module)
    """The connection broke or the server is busy, so the download is retried."""


def download(remote: RemoteFile, target: Path, advance: Progress) -> None:
    """Download `remote` to `target`, replacing an existing file. The target's folder must exist.

    `advance` is called with (done_bytes, total_bytes); the total is 0 if unknown. After a network
    failure or an interruption, the received bytes are kept. Raises PopError.
    """
    with download_lock(target):
        _Transfer(remote, target, advance).run()


class _Transfer:
    def __init__(self, remote: RemoteFile, target: Path, advance: Progress) -> None:
        self._remote, self._target, self._advance = remote, target, advance
        self._partial = target.with_name(f"{target.name}.partial")
        self._origin_file = target.with_name(self._partial.name + ORIGIN_SUFFIX)
        # A hash, since the URL may contain secrets.
        self._identity = hashlib.sha256((remote.sha256 or remote.url).encode()).hexdigest()
        self._shown = _without_secrets(remote.url)
        self._host = urlsplit(remote.url).hostname or self._shown

    def run(self) -> None:
        try:
            self._fetch()
            self._check()
            with self._partial.open("r+b") as file:
                os.fsync(file.fileno())
            self._partial.replace(self._target)
        finally:
            if self._size() == 0:  # nothing received, or already renamed
                self._forget()

    def _fetch(self) -> None:
        failures, most = 0, self._size()
        while True:
            try:
                self._attempt()
                return
            except _Dropped as dropped:
                failures = 1 if self._size() > most else failures + 1
                most = max(most, self._size())
                if failures > _MAX_FAILURES:
                    resumes = "; the download will resume" if self._kept()[0] else ""
                    hint = f"check the network and try again{resumes}"
                    raise PopError(f"{self._host}: {dropped}", hint) from dropped
            time.sleep(_PAUSE_S)

    def _forget(self) -> None:
        for path in (self._partial, self._origin_file):
            with suppress(OSError):
                path.unlink()

    def _size(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _kept(self) -> tuple[int, str, int]:
        """Return the number of bytes received, the file's validator, and the file's total size.

        The result is (0, "", 0) if the download cannot be resumed.
        """
        try:
            identity, validator, total = json.loads(self._origin_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return 0, "", 0
        # Without a hash or a validator, the resumed file could mix parts of two files.
        fits = identity == self._identity and total and (validator or self._remote.sha256)
        return (self._size(), validator, total) if fits else (0, "", 0)

    def _attempt(self) -> None:
        import requests

        headers = {"Accept-Encoding": "identity", **self._remote.headers}
        start, validator, total = self._kept()
        if start:
            if start == total:
                return
            headers["Range"] = f"bytes={start}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with requests.get(
                self._remote.url,
                headers=headers,
                # The header's token takes precedence over ~/.netrc.
                auth=(lambda request: request) if "authorization" in headers else None,
                # requests unpacks the bodies of redirects, too.
                hooks={"response": self._require_unpacked},
                stream=True,
                timeout=_TIMEOUT_S,
            ) as response:
                self._check_status(response)
                self._receive(response, start)
        # The messages of requests' errors are not shown, since they may contain the URL's query.
        except requests.exceptions.SSLError as error:
            raise PopError(
                f"cannot establish a secure connection to {self._host}: {reason_of(error)}",
                "check the system clock and the CA certificates (REQUESTS_CA_BUNDLE)",
            ) from error
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            raise _Dropped(_BROKE_OFF) from error
        except (requests.RequestException, ValueError) as error:  # urllib3 raises ValueError
            raise PopError(
                f"{self._shown} cannot be fetched ({type(error).__name__})", "check the URL"
            ) from error

    def _require_unpacked(self, response: "requests.Response", **_: object) -> None:
        """Raise PopError if a reply is compressed: an unpacked reply could grow without limit."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity" and response.status_code < 400:
            raise PopError(
                f"the server compressed {self._shown} ({encoding}), which is not supported",
                "download the file from a different URL",
            )

    def _check_status(self, response: "requests.Response") -> None:
        code = response.status_code
        if code in (200, 206):
            return
        if code == 416:  # the server's file is shorter
            self._forget()
            raise _Dropped(_CHANGED)
        if code in _BUSY:
            raise _Dropped(f"the server returned HTTP status {code} {response.reason}")
        name, hint = self._target.name, "check the URL"
        message = f"{self._host} returned HTTP status {code} {response.reason} for {name}"
        if code in (401, 403):
            message = f"{self._host} denies access to {name} ({code})"
            hint = "check that you have access to this file, or download it with a browser"
        elif code in (404, 410):
            message = f"{self._shown} does not exist"
        raise PopError(message, hint)

    def _receive(self, response: "requests.Response", requested: int) -> None:
        start, total = _extent(response)
        etag = response.headers.get("ETag", "")
        is_strong = etag and not etag.startswith("W/")
        validator = etag if is_strong else response.headers.get("Last-Modified", "")
        if start:
            # If a server ignores If-Range or sends no validator, only the hash reveals a change.
            _, known, known_total = self._kept()
            has_changed = total != known_total or (validator and known and validator != known)
            if start != requested or has_changed:
                self._forget()
                raise _Dropped(_CHANGED)
            validator = known
        require_space(self._target.parent, total - start, self._target.name)
        chunks = response.iter_content(_CHUNK_BYTES)
        begun = b""
        while not start and len(begun) < len(MAGIC) and (chunk := next(chunks, b"")):
            begun += chunk
        # Check the first bytes before writing, so a web page does not replace the partial file.
        if not start and not begun.startswith(MAGIC):
            is_page = response.headers.get("Content-Type", "").startswith("text/html")
            what = "empty" if not begun else "a web page" if is_page else "not a GGUF file"
            raise FormatError(
                f"{self._shown} is {what}",
                "pass the URL of the GGUF file itself, or hf:OWNER/REPO for a Hugging Face"
                " repository",
            )
        origin = (self._identity, validator, total)
        self._origin_file.write_text(json.dumps(origin), encoding="utf-8")
        done = start
        with self._partial.open("r+b" if start else "wb") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in filter(None, chain([begun], chunks)):
                if total == 0:
                    require_space(self._target.parent, _UNANNOUNCED_BYTES, self._target.name)
                file.write(chunk)
                file.flush()
                done += len(chunk)
                self._advance(done, total)
        if done < total:
            raise _Dropped(_BROKE_OFF)

    def _check(self) -> None:
        """Check the hash and the header, because a server may report the wrong length."""
        sha256 = self._remote.sha256
        if sha256 and (found := file_sha256(self._partial)) != sha256:
            self._forget()
            raise PopError(
                f"{self._host} sent a damaged or incorrect file for {self._target.name}:"
                f" the SHA-256 is {found}, not {sha256}",
                "the download was deleted; try again, and compare the hash with the publisher's",
            )
        try:
            read_header(self._partial)
        except TruncatedError as error:
            self._forget()
            what = error.message.removeprefix(f"{self._partial} ")
            raise FormatError(f"the file from {self._shown} {what}", "try again") from error
        except FormatError:
            return  # the file may have a newer format


def _extent(response: "requests.Response") -> tuple[int, int]:
    """Return the reply's offset in the file, and the file's size (0: unknown).

    The offset is -1 if the reply is partial and its range is invalid.
    """
    if response.status_code == 206:
        extent = response.headers.get("Content-Range", "")
        part = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", extent)
        return (int(part[1]), int(part[2])) if part else (-1, 0)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else 0
