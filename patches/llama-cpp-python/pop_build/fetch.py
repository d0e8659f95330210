"""Download the pinned source distribution with pip, cache it, and verify its hash on each use."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildError

SOURCE_VARIABLE = "POP_LLAMA_CPP_PYTHON_SOURCE"
_PIN = re.compile(r"^([A-Za-z0-9_-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)


@dataclass(frozen=True)
class Pin:
    """The upstream release that upstream.txt pins by version and hash."""

    name: str
    version: str
    sha256: str
    requirement: Path

    @property
    def sdist(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(requirement: Path) -> Pin:
    match = _PIN.search(requirement.read_text(encoding="utf-8"))
    if match is None:
        raise BuildError(
            f"{requirement.name} does not pin a release.",
            "Add this line to the file: NAME==VERSION --hash=sha256:DIGEST",
        )
    return Pin(match[1], match[2], match[3], requirement)


def cache_folder() -> Path:
    """Return this platform's cache folder for source distributions."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pop-local"


def fetch_or_keep(pin: Pin, fallback: Path) -> Path:
    """Download the sdist to the user's cache, or to `fallback` if the cache is unusable."""
    try:
        return fetch(pin, cache_folder())
    except (OSError, RuntimeError):  # no home folder, or no permission to write there
        return fetch(pin, fallback)


def fetch(pin: Pin, folder: Path) -> Path:
    """Download the source distribution to `folder` if necessary, and return its path."""
    cached = folder / pin.sdist
    if cached.is_file() and _sha256(cached) == pin.sha256:
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _download(pin, Path(scratch))
        download = Path(scratch) / pin.sdist
        check(pin, download)
        return download.replace(cached)


def check(pin: Pin, sdist: Path) -> None:
    if not sdist.is_file():
        raise BuildError(f"pip succeeded but did not download {pin.sdist}.", _hint())
    digest = _sha256(sdist)
    if digest != pin.sha256:
        raise _mismatch(pin, f"The downloaded file's sha256 is {digest}.")


def _mismatch(pin: Pin, detail: str) -> BuildError:
    return BuildError(
        f"The package index's copy of {pin.sdist} differs from the pinned file."
        f" {detail} The pinned sha256 is {pin.sha256}.",
        f"Set {SOURCE_VARIABLE} to a trusted copy of the pinned file.",
    )


def _download(pin: Pin, folder: Path) -> None:
    # Our build backend's settings are dropped, since pip would apply them to upstream's package.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("_PYPROJECT_HOOKS", "PEP517_"))}
    # pip checks the requirement's hash before it runs any code of the downloaded package.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", pin.name, "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "-d", str(folder), "-r", str(pin.requirement)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if run.returncode != 0 and "DO NOT MATCH THE HASHES" in run.stderr:
        raise _mismatch(pin, "pip reported a hash mismatch.")
    if run.returncode != 0:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        # After an unexpected error, the reason is in the last line of a traceback.
        errors = [line for line in lines if re.match("ERROR: (?!Exception:)", line)] or lines[-5:]
        reason = "\n     ".join(errors)
        raise BuildError(
            f"pip could not download {pin.name} {pin.version}:\n     {reason}", _hint()
        )


def _hint() -> str:
    return (
        "Check your network connection and pip's index settings (`pip config list` and"
        f" PIP_INDEX_URL). Alternatively, set {SOURCE_VARIABLE} to a local source distribution or"
        " an extracted tree."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
