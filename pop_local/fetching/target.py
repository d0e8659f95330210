"""Checks of the place for a fetched model, which all ways of fetching share."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pop_converter.base.errors import OutputExistsError, PopError
from pop_local.models.model_names import MODELS_VARIABLE

_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 255 - len(".partial.origin")


def safe_name(name: str) -> str:
    """Make a file name for any system out of a server's; it may be empty."""
    return re.sub(r"[^\w .+()=@,-]", "_", name).strip(" .")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_fetched(target: Path, sha256: str, what: str, *, force: bool) -> bool:
    """Tell whether the file is there already; without a `sha256` nobody can tell.

    Raises PopError for a folder or too long a name, OutputExistsError for another file unless
    `force`.
    """
    if len(os.fsencode(target.name)) > _MAX_NAME_BYTES:
        raise PopError(f"{target.name} is too long a name for a file", "fetch it another way")
    if target.is_dir():
        raise PopError(
            f"{target} is a folder",
            "move it away, or choose another folder",
            cause="download-is-folder",
        )
    if not target.exists():
        return False
    if sha256 and file_sha256(target) == sha256:
        return True
    if force:
        return False
    differs = f" but is not {what}: its sha256 differs" if sha256 else ""
    raise OutputExistsError(
        f"{target} exists{differs}",
        "move it away, replace it (force=True), or choose another folder",
        cause="download-exists",
    )


@contextmanager
def download_lock(target: Path) -> Iterator[None]:
    """Keep others from fetching to the same place; two would write into one partial file.

    Raises PopError while another process does.
    """
    from filelock import FileLock, Timeout

    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no open file
                    lock.unlink()
    except Timeout as error:
        raise PopError(
            f"{target.name} is being fetched already", "wait until the other one is done"
        ) from error


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise PopError when the folder's disk has fewer bytes free than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise PopError(
            f"{folder} has {free / 1e6:.0f} MB free; fetching {what} takes"
            f" {needed_bytes / 1e6:.0f} MB",
            f"free some space, or choose another folder (${MODELS_VARIABLE})",
            cause="no-space-for-download",
            variable=MODELS_VARIABLE,
        )
