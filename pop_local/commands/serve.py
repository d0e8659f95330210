"""`pop-local serve MODEL`: the model behind the HTTP APIs that programs speak."""

import errno
import importlib.util
import logging
import re
import socket
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_local.commands import shared_options as opt
from pop_local.commands.opening import Opener, default_model, lessons
from pop_local.commands.option_expansion import Group, expand_options, option
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.model import PopModel
from pop_local.models.model_names import lookup
from pop_local.ui.theme import note, warn

if TYPE_CHECKING:
    from pop_local.server.model_pool import ModelPool

_PACKAGES = ("prometheus_client", "pydantic", "starlette", "uvicorn")


@dataclass(frozen=True)
class ServerOptions(Group):
    host: str = option("Address to listen on; 0.0.0.0 for all networks.", default="127.0.0.1")
    port: int = option("0 takes any free one.", min=0, max=65535, default=8080)
    api_key: str = option(
        "Clients must send it as their key. Default: no key; requests to other host names, and of"
        " web pages that are not of this machine, are refused.",
        envvar="POP_LOCAL_API_KEY",
        show_envvar=True,
        default="",
    )
    name: str = option(
        "The model's name in the API. Default: the catalog's, if MODEL is, or the file's.",
        default="",
    )
    strict_model: bool = option(
        "Refuse requests for other models, which MODEL answers otherwise.", default=False
    )
    models: Path | None = option(
        "Serve the models of this folder by the names that `list` shows, each opened when it is"
        " asked for. MODEL is one of them, opened at the start; it answers where no name is given."
        " Without it the one that was asked for last does, at first the first one.",
        "FOLDER",
        exists=True,
        file_okay=False,
    )
    ram: float | None = option(
        "With --models: memory for open models, idle ones are closed for others. Default: one at a"
        " time is open.",
        "GIB",
        min=0.0,
        callback=opt.finite,
    )
    cors: list[str] | None = option(
        "Web pages of this origin may ask without a key, as those of this machine may; again for"
        " more.",
        "ORIGIN",
    )
    cache_ram: int = option(
        "Memory for the KV caches of earlier prompts; 0 keeps the last one only.",
        "MIB",
        min=0,
        default=2048,
    )
    parallel: int | None = option(
        "Requests that are answered at once, each with a context of its own. Default: 2 with 8 GB"
        " of free memory, else 1; 1 for a model that learns, and with --repeatable.",
        "N",
        min=1,
        max=64,
    )
    max_waiting: int = option(
        "Requests that may wait; those beyond are refused (503).", min=1, default=256
    )
    repeatable: bool = option(
        "The same request gets the same answer, at temperature 0 or with a seed: each prompt is"
        " read as if it were new.",
        default=False,
    )


@expand_options
def serve(
    call: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a name, or hf:OWNER/REPO. Default: the one that `chat` takes.",
        ),
    ] = None,
    *,
    to: ServerOptions,
    how: opt.ModelOptions = opt.ModelOptions(refill="idle", learn="on"),
) -> None:
    """Serve a model to programs that speak OpenAI's API, Ollama's or llama-server's, and a page.

    --parallel says how many requests are answered at once; others wait in line. A request may carry
    "pop": false to be read in full. /health and /metrics (Prometheus) tell how the server is.
    """
    serve_named(model, to, how, opt.given_names(call))


def serve_named(
    model: str | None,
    to: ServerOptions,
    how: opt.ModelOptions,
    asked: Collection[str],
    on_ready: Callable[[str], None] = lambda root: None,
) -> None:
    """Serve until a signal. `asked`: names of the options that the command line has. `on_ready`
    gets the address once connections are taken.
    """
    _require_usage(to, how)
    _require_packages()
    origins = tuple(map(_origin, to.cors or ()))
    listening = _bound(to.host, to.port)
    _log_to_stderr()
    from pop_local.server.access import LOOPBACK, AccessRules
    from pop_local.server.app import create_app, run_app

    if to.models is None:
        model = model or default_model()
    models = _models(to, Opener(model or "", how, asked, _n_parallel(to, how)))
    try:
        entry = AccessRules(to.api_key, to.host, origins)
        app = create_app(models, entry, strict_model=to.strict_model)
        try:
            listening.listen(128)
        except OSError as error:  # another program was faster
            raise _cannot_listen(to.host, to.port, error) from error
        root = _root(listening)
        _announce(models, to)
        _announce_address(root, is_open=to.host not in LOOPBACK and not to.api_key)
        on_ready(root)
        run_app(app, listening)
    finally:
        listening.close()
        models.close()


def _require_usage(to: ServerOptions, how: opt.ModelOptions) -> None:
    """Raises BadParameter for options that do not go together."""
    if to.models is None:
        if to.ram is not None:
            raise typer.BadParameter("it is for several models: give --models", param_hint="--ram")
        return
    of_one = {"--name": to.name, "--sidecar": how.sidecar, "--mmproj": how.mmproj}
    for name, value in of_one.items():
        if value:
            reason = "it belongs to one model, and --models serves several"
            raise typer.BadParameter(reason, param_hint=name)


def _models(to: ServerOptions, opener: Opener) -> "ModelPool":
    """Make the models of the server; the opener's is opened."""
    from pop_local.server.model_listing import ModelFile, find, models_in, shown
    from pop_local.server.model_pool import ModelPool, ModelRegistry

    prompts = PromptCache(to.cache_ram * 2**20) if to.cache_ram else None

    def opened_by(name: str | None) -> PopModel:
        opened = opener(name)
        opened.keep_prompts(prompts)
        return opened

    how: dict[str, Any] = {"max_waiting": to.max_waiting, "repeatable": to.repeatable}
    if (folder := to.models) is None:
        one = opened_by(None)
        # One of the catalog is kept as it was given: requests are likely to use it.
        name = to.name or (opener.model if lookup(opener.model) else shown(one.path.stem))
        return ModelPool.of_one(ModelFile(name, one.path), one, lessons, **how)
    ram_bytes = int((to.ram or 0) * 2**30)
    registry = ModelRegistry(
        lambda: models_in(folder),
        lambda path: opened_by(str(path)),
        lessons,
        opener.options.ctx,
        can_see=True,
        n_parallel=opener.n_parallel or 2,  # at most, where the model decides
    )
    files = registry.files()
    model = opener.model
    file = find(model, files) if model else None
    if model and file is None:
        hint = nearest_hint(model, {name: name for name in files}, "give the name of one that is")
        raise PopError(f"there is no model {model!r} in {folder}", hint)
    models = ModelPool(registry, ram_bytes=ram_bytes, default=file.name if file else "", **how)
    if file:
        models.load(file)
    else:
        models.check()
    return models


def _n_parallel(to: ServerOptions, how: opt.ModelOptions) -> int | None:
    """Return how many requests are answered at once, None where the model decides."""
    reasons = {
        "--repeatable": to.repeatable,
    }
    one = next((name for name, is_so in reasons.items() if is_so), None)
    if one is not None and (to.parallel or 1) > 1:
        message = f"{one} is for one request at a time: leave it out, or take --parallel 1"
        raise typer.BadParameter(message, param_hint="--parallel")
    return 1 if one else to.parallel


def _origin(given: str) -> str:
    origin = given.strip().removesuffix("/").lower()
    if not re.fullmatch(r"[\w+.-]+://[^/*?#\s]+", origin):
        raise PopError(
            f"{given!r} is no origin of web pages",
            "give scheme, name and port as in https://example.org:8443; with --api-key, pages of"
            " all origins may ask",
        )
    return origin


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PopError(
            f"serving needs {', '.join(missing)}",
            "install them with: pip install 'pop-local[server]'",
        )


_BIND_HINTS = {
    errno.EADDRINUSE: "another program uses it: try --port 0 for any free one",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 for all of them",
    errno.EACCES: "low ports are the system's: try --port 8080",
}


def _bound(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PopError(
            f"{host} is no address of this machine: {reason}", _BIND_HINTS[errno.EADDRNOTAVAIL]
        ) from error
    if sys.platform != "win32":  # where it would let two servers share a port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _cannot_listen(host, port, error) from error
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> PopError:
    return PopError(
        f"cannot listen on {host} port {port}: {error.strerror}",
        _BIND_HINTS.get(error.errno or 0, "try --port 0 for any free one"),
    )


def _root(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(models: "ModelPool", to: ServerOptions) -> None:
    for served in models.loaded:
        _announce_model(served.name, served.model)
    if to.models is not None:
        kept = f"within {to.ram:g} GiB of memory" if to.ram else "one at a time"
        names = ", ".join(models.names) or "none yet"
        note(f"Models of {to.models}, opened when they are asked for, {kept}: {names}.")


def _announce_model(name: str, opened: PopModel) -> None:
    pruning = f"pruned from layer {opened.boundary} on" if opened.mode else "not pruned"
    if opened.mode and opened.exact:
        pruning = f"read exactly: context tokens leave at layer {opened.exact}"
    note(f"{name}, context of {opened.n_ctx:,} tokens, prompts {pruning}.")
    if opened.mmproj and not opened.can_see:
        warn("No pictures are read, since Pillow is missing: pip install 'pop-local[images]'")
    elif opened.mmproj:
        note(f"Pictures are read, by {opened.mmproj.name}, out of data: URLs.")


def _announce_address(root: str, is_open: bool) -> None:
    if is_open:
        warn("Anyone who reaches this machine can use the model: set --api-key.")
    note(f"Serving at {root}/v1, a page at {root}/ (Ctrl-C stops)")


def _log_to_stderr() -> None:
    log = logging.getLogger("pop_local.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
