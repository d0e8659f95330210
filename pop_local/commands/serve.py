"""`pop-local serve MODEL`: serve models over HTTP."""

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
    host: str = option("Address to listen on (0.0.0.0: all networks).", default="127.0.0.1")
    port: int = option("Port to listen on (0: any free port).", min=0, max=65535, default=8080)
    api_key: str = option(
        "Key that clients must send. Without one, requests with another host name and requests"
        " from other machines' web pages are refused.",
        envvar="POP_LOCAL_API_KEY",
        show_envvar=True,
        default="",
    )
    name: str = option(
        "The model's name in the API (default: the catalog name, or the file name).",
        default="",
    )
    strict_model: bool = option(
        "Refuse requests for other models instead of answering them with MODEL.", default=False
    )
    models: Path | None = option(
        "Serve all models of this folder under the names that `list` shows, and open each on"
        " demand. MODEL is the one opened at the start, which answers requests without a name"
        " (default: the last one requested).",
        "FOLDER",
        exists=True,
        file_okay=False,
    )
    ram: float | None = option(
        "With --models: memory limit, above which idle models are closed (default: one open model"
        " at a time).",
        "GIB",
        min=0.0,
        callback=opt.finite,
    )
    cors: list[str] | None = option(
        "Allow web pages of this origin to send requests without a key; repeatable.",
        "ORIGIN",
    )
    cache_ram: int = option(
        "Memory for the KV caches of earlier prompts (0: keep only the last one).",
        "MIB",
        min=0,
        default=2048,
    )
    parallel: int | None = option(
        "Number of slots, each with its context. Default: 2 with 8 GB of free memory, else 1; 1"
        " for a model that learns, and with --repeatable.",
        "N",
        min=1,
        max=64,
    )
    max_waiting: int = option(
        "Maximum queue length; further requests are refused (503).", min=1, default=256
    )
    repeatable: bool = option(
        "Read each prompt without the cache, so that equal requests get equal answers at"
        " temperature 0 or with a seed.",
        default=False,
    )


@expand_options
def serve(
    call: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a name, or hf:OWNER/REPO (default: as for `chat`).",
        ),
    ] = None,
    *,
    to: ServerOptions,
    how: opt.ModelOptions = opt.ModelOptions(refill="idle", learn="on"),
) -> None:
    """Serve a model over the APIs of OpenAI, Anthropic, Ollama and llama-server, with a web page.

    --parallel sets the number of requests answered concurrently; others wait in a queue. A request
    with "pop": false is read in full. /health and /metrics (Prometheus) report the server's state.
    """
    serve_named(model, to, how, opt.given_names(call))


def serve_named(
    model: str | None,
    to: ServerOptions,
    how: opt.ModelOptions,
    asked: Collection[str],
    on_ready: Callable[[str], None] = lambda root: None,
) -> None:
    """Serve until a signal. `asked`: the options on the command line.

    `on_ready` receives the address when the server accepts connections.
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
        except OSError as error:  # another program took the port
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
    """Raise BadParameter for options that exclude each other."""
    if to.models is None:
        if to.ram is not None:
            raise typer.BadParameter("requires --models", param_hint="--ram")
        return
    of_one = {"--name": to.name, "--sidecar": how.sidecar, "--mmproj": how.mmproj}
    for name, value in of_one.items():
        if value:
            reason = "this option is for a single model, not for --models"
            raise typer.BadParameter(reason, param_hint=name)


def _models(to: ServerOptions, opener: Opener) -> "ModelPool":
    """Return the server's models, with the opener's model loaded."""
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
        # Requests are likely to use the name that the user typed.
        name = to.name or (opener.model if lookup(opener.model) else shown(one.path.stem))
        return ModelPool.of_one(ModelFile(name, one.path), one, lessons, **how)
    ram_bytes = int((to.ram or 0) * 2**30)
    registry = ModelRegistry(
        lambda: models_in(folder),
        lambda path: opened_by(str(path)),
        lessons,
        opener.options.ctx,
        can_see=True,
        n_parallel=opener.n_parallel or 2,  # an upper limit if the model decides
    )
    files = registry.files()
    model = opener.model
    file = find(model, files) if model else None
    if model and file is None:
        hint = nearest_hint(model, {name: name for name in files}, "see `pop-local list`")
        raise PopError(f"{folder} has no model {model!r}", hint)
    models = ModelPool(registry, ram_bytes=ram_bytes, default=file.name if file else "", **how)
    if file:
        models.load(file)
    else:
        models.check()
    return models


def _n_parallel(to: ServerOptions, how: opt.ModelOptions) -> int | None:
    """Return the number of slots, None if the model decides."""
    reasons = {
        "--repeatable": to.repeatable,
    }
    one = next((name for name, is_so in reasons.items() if is_so), None)
    if one is not None and (to.parallel or 1) > 1:
        message = f"{one} supports one slot; remove it or use --parallel 1"
        raise typer.BadParameter(message, param_hint="--parallel")
    return 1 if one else to.parallel


def _origin(given: str) -> str:
    origin = given.strip().removesuffix("/").lower()
    if not re.fullmatch(r"[\w+.-]+://[^/*?#\s]+", origin):
        raise PopError(
            f"{given!r} is not an origin of web pages",
            "give scheme, host and port, for example https://example.org:8443. With --api-key all"
            " origins are allowed",
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
    errno.EADDRINUSE: "another program uses this port; try --port 0 for any free one",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 for all networks",
    errno.EACCES: "low ports are reserved; try --port 8080",
}


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket, bound before the model loads so that a port in use fails early."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PopError(
            f"{host} is not an address of this machine: {reason}", _BIND_HINTS[errno.EADDRNOTAVAIL]
        ) from error
    if sys.platform != "win32":  # Windows would let two servers share a port
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
        kept = f"up to {to.ram:g} GiB of memory" if to.ram else "one at a time"
        names = ", ".join(models.names) or "none yet"
        note(f"Models in {to.models}, opened on demand, {kept}: {names}.")


def _announce_model(name: str, opened: PopModel) -> None:
    pruning = f"prompts skip layers {opened.boundary} and up" if opened.mode else "no pruning"
    if opened.mode and opened.exact:
        pruning = f"prompts skip layers {opened.exact} and up, exactly"
    note(f"{name}: context of {opened.n_ctx:,} tokens, {pruning}.")
    if opened.mmproj and not opened.can_see:
        warn("Pictures are disabled: Pillow is missing (pip install 'pop-local[images]').")
    elif opened.mmproj:
        note(f"Pictures are enabled ({opened.mmproj.name}), as data: URLs.")


def _announce_address(root: str, is_open: bool) -> None:
    if is_open:
        warn("Anyone who can reach this machine can use the model; set --api-key.")
    note(f"Serving at {root}/v1, with a web page at {root}/ (Ctrl-C to stop)")


def _log_to_stderr() -> None:
    log = logging.getLogger("pop_local.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
