"""Download a file from a server that may misbehave."""

import hashlib
import random
from pathlib import Path

from pop_base.progress import Progress
from pop_local.models import resumable_download
from pop_local.models.resumable_download import RemoteFile, download
from support.calls import ignore
from support.hub_server import Hub

MODEL = b"GGUF" + random.Random(0).randbytes(700_000)
OTHER = b"GGUF" + random.Random(1).randbytes(700_000)
# The client keeps chunks that were complete when a connection broke.
CHUNK = resumable_download._CHUNK_BYTES
HALF = 5 * CHUNK
SHA256 = hashlib.sha256(MODEL).hexdigest()


def pull(
    hub: Hub,
    folder: Path,
    *,
    name: str = "tiny.gguf",
    sha256: str = SHA256,
    size_bytes: int = len(MODEL),
    advance: Progress = ignore,
) -> Path:
    target = folder / "tiny.gguf"
    download(RemoteFile(hub.url(name), {}, sha256, name, size_bytes), target, advance)
    return target


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "", "")).encode() + body
