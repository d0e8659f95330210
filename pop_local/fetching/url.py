"""A GGUF file at any URL."""

from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from pop_converter.base.errors import PopError
from pop_converter.base.progress import Progress
from pop_local.fetching.download import RemoteFile, download, without_secrets
from pop_local.fetching.target import is_fetched, safe_name
from pop_local.models.model_files import SUFFIX


def fetch_url(url: str, folder: Path, sha256: str, advance: Progress, *, force: bool) -> Path:
    """Fetch the file at `url` into `folder` under its own name, and return its path.

    `sha256` may be "". An existing file with that hash is kept; another file is refused unless
    `force`. `advance` is called with (done_bytes, total_bytes). Raises PopError.
    """
    target = folder / file_name(url)
    if is_fetched(target, sha256, f"the file of sha256 {sha256}", force=force):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    download(RemoteFile(url, sha256=sha256), target, advance)
    return target


def file_name(url: str) -> str:
    """Return the last part of the address as a safe file name.

    Raises PopError if the address is invalid, or has no host or no file name.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # its message may contain a password
        raise PopError("invalid address", "give the full address of a GGUF file") from error
    if not parts.hostname:
        raise PopError(
            f"{without_secrets(url)} has no host", "give the full address of a GGUF file"
        )
    name = safe_name(PurePosixPath(unquote(parts.path)).name)
    if not name:
        raise PopError(
            f"{without_secrets(url)} has no file name",
            "give the URL of a GGUF file (.../NAME.gguf)",
        )
    return name if name.lower().endswith(SUFFIX) else name + SUFFIX
