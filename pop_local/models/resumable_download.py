"""Download a file from a hub using the hub client's connections, and verify its hash.

An unfinished download is stored as NAME.gguf.partial, and the next call resumes it. The hub client
itself would download the whole file again.
"""

import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pop_base.errors import PopError
from pop_base.progress import Progress
from pop_local.models.model_files import PARTIAL_SUFFIX
from pop_local.models.target import download_lock, file_sha256

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 60  # to connect, and between chunks
_MAX_FAILURES = 3  # consecutive failures without a new byte
_PAUSE_S = 1.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub, with the name, size, and hash that the hub reports.

    `headers` are sent only to the URL's host. `sha256` is "" if unknown.
    """

    url: str
    headers: Mapping[str, str]
    sha256: str
    name: str
    size_bytes: int


def reason_of(error: BaseException) -> str:
    """Return the reason that OpenSSL or the operating system gives, or the error's class name.

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


def download(remote: RemoteFile, target: Path, advance: Progress) -> None:
    """Download `remote` to `target`, replacing any existing file. The target's folder must exist.

    Calls `advance` with (done_bytes, total_bytes). After a network failure or an interruption, the
    received bytes are kept. Raises PopError.
    """
    if not remote.size_bytes:
        raise PopError(f"the file {remote.name} on the hub is empty", "choose a different file")
    partial = target.with_suffix(PARTIAL_SUFFIX)
    with download_lock(target):
        # Without a hash, a resumed file could mix parts of two files. If the partial file is a
        # link, the download would overwrite the link's target.
        if not remote.sha256 or partial.is_symlink() or _size(partial) > remote.size_bytes:
            partial.unlink(missing_ok=True)
        _receive(remote, partial, advance)
        if remote.sha256 and (sha256 := file_sha256(partial)) != remote.sha256:
            partial.unlink()
            raise PopError(
                f"the hub sent a damaged or incorrect file for {target.name}:"
                f" its SHA-256 is {sha256}, but {remote.sha256} was expected",
                "the download was deleted; try again",
            )
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # Linux then reads the file again in larger pages
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.replace(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(remote: RemoteFile, partial: Path, advance: Progress) -> None:
    """Append the file's missing bytes to `partial`, and retry if the connection fails."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    n_failures, reason = 0, "the response was cut off"
    while (before := _size(partial)) < remote.size_bytes:
        try:
            _append(remote, partial, before, advance)
        except HTTPError as error:
            reason = reason_of(error)
            if isinstance(error, HfHubHTTPError):
                code = error.response.status_code
                reason = f"the hub returned HTTP status {code} for {remote.name}"
                if code not in _BUSY:
                    raise PopError(reason, "try again later") from error
        if _size(partial) == remote.size_bytes:
            return
        n_failures = 1 if _size(partial) > before else n_failures + 1
        if n_failures > _MAX_FAILURES:
            resumes = remote.sha256 and _size(partial)
            again = "try again (the download will resume)" if resumes else "try again"
            raise PopError(
                f"the download from {urlsplit(remote.url).hostname} was interrupted: {reason}",
                f"check your network connection and {again}",
            )
        time.sleep(_PAUSE_S)


def _append(remote: RemoteFile, partial: Path, start: int, advance: Progress) -> None:
    """Request the bytes from `start` onward. If the server sends the whole file, start over."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {"Accept-Encoding": "identity", **remote.headers}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", remote.url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        with partial.open("ab" if response.status_code == 206 else "wb") as file:
            done = file.tell()
            # Unlike a decompressed reply, raw bytes cannot grow beyond the bytes received.
            for chunk in response.iter_raw(_CHUNK_BYTES):
                if (done := done + len(chunk)) > remote.size_bytes:
                    raise PopError(
                        f"the hub sent more than {remote.size_bytes:,} bytes for {remote.name}",
                        "try again later",
                    )
                file.write(chunk)
                file.flush()
                advance(done, remote.size_bytes)
