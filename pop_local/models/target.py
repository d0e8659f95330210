"""Lock and check a download's target file, and make sure the disk has enough free space."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pop_base.errors import OutputExistsError, PopError
from pop_local.models.model_names import MODELS_VARIABLE

_CHUNK_BYTES = 1 << 20


def safe_name(name: str) -> str:
    """Replace characters that some file systems do not allow in names. The result may be ""."""
    return re.sub(r"[^\w .+()=@,-]", "_", name).strip(" .")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_fetched(target: Path, sha256: str, what: str, *, force: bool) -> bool:
    """Return True if the target already exists and has the hash `sha256`.

    Raises PopError, or OutputExistsError if a different file exists and `force` is false.
    """
    if target.is_dir():
        raise PopError(
            f"{target} is a folder",
            "move the folder, or choose a different target folder",
            cause="download-is-folder",
        )
    if not target.exists():
        return False
    if sha256 and file_sha256(target) == sha256:
        return True
    if force:
        return False
    message = f"{target} already exists, but its SHA-256 does not match {what}"
    raise OutputExistsError(
        message if sha256 else f"{target} already exists",
        "move the file, pass force=True to replace it, or choose a different folder",
        cause="download-exists",
    )


@contextmanager
def download_lock(target: Path) -> Iterator[None]:
    """Lock the target. Raises PopError if another process holds the lock."""
    from filelock import FileLock, Timeout

    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows cannot remove open files
                    lock.unlink()
    except Timeout as error:
        raise PopError(
            f"another process is downloading {target.name}", "wait for that process to finish"
        ) from error


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise PopError if `folder` is on a disk with less than `needed_bytes` of free space."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PopError(
            f"{folder} has {free / 1e6:.0f} MB free, but {what} needs {needed_bytes / 1e6:.0f} MB",
            f"free up disk space, or set ${MODELS_VARIABLE} to a different folder",
            cause="no-space-for-download",
            variable=MODELS_VARIABLE,
        )
