"""`pop-local serve MODEL`: serve models over HTTP."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from pop_base.errors import PopError
from pop_local.commands import shared_options as opt
from pop_local.commands.opening import Opener, default_model, open_prompt_cache
from pop_local.commands.option_expansion import Group, expand_options, expert, option
from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.model import PopModel
from pop_local.models.model_names import lookup
from pop_local.ui.console import note, warn
from pop_local.ui.error_output import PrintableFormatter

if TYPE_CHECKING:
    from pop_local.server.model_pool import ModelPool


@dataclass(frozen=True)
class ServerOptions(Group):
    host: str = option("Address to listen on, or 0.0.0.0 for all interfaces.", default="127.0.0.1")
    port: int = option("Port to listen on, or 0 for any free port.", min=0, max=65535, default=8080)
    api_key: list[str] | None = option(
        "API key that clients must send (repeatable). Without a key, the server rejects requests"
        " from pages on other websites and requests whose Host header names a different host.",
        "KEY",
        envvar="POP_LOCAL_API_KEY",
        show_envvar=True,
    )
    cache_scope: Literal["client", "shared"] = option(
        "Which clients may reuse a cached prompt (default: client). client: only clients with the"
        " prompt sender's API key (or, if no keys are set, IP address). shared: all clients.",
        "SCOPE",
        default="client",
    )
    name: str = expert("Model name in APIs (default: the catalog name or file name).", default="")
    strict_model: bool = expert("Reject requests that name an unknown model.", default=False)
    models: Path | None = option(
        "Serve each model in this folder under the name that `pop-local list` shows. The server"
        " loads models on demand. If you also pass MODEL, the server loads MODEL at startup and"
        " uses it for requests without a model name. Otherwise, the server uses the most recently"
        " requested model.",
        "FOLDER",
        exists=True,
        file_okay=False,
    )
    ram: float | None = option(
        "Memory limit for --models. The server unloads idle models to free memory. Without"
        " this option, the server keeps only one model loaded at a time.",
        "GIB",
        min=0.0,
        callback=opt.finite,
    )
    cors: list[str] | None = option(
        "Allow this origin's web pages to send requests without a key (repeatable).", "ORIGIN"
    )
    cache_ram: int = expert(
        "Memory for prompt caches (0: keep only the latest cache).", "MIB", min=0, default=2048
    )
    parallel: int | None = option(
        "Number of concurrent answers, each with its own context. The default is 2 if at least"
        " 8 GB of memory is free and --repeatable is off. Otherwise, it is 1.",
        "N",
        min=1,
        max=64,
    )
    max_waiting: int = expert(
        "Maximum number of waiting requests before the server returns status 503.",
        min=1,
        default=256,
    )
    repeatable: bool = expert(
        "Return identical answers to identical requests at temperature 0 or with a fixed seed. The"
        " server then reads prompts one at a time and without the cache.",
        default=False,
    )


@expand_options
def serve(
    model: opt.OptionalModel = None,
    *,
    to: ServerOptions,
    how: opt.ModelOptions = opt.ModelOptions(refill="idle"),
) -> None:
    """Serve a model over the OpenAI, Anthropic, Ollama, and llama-server APIs and on a web page.

    --parallel sets the number of concurrent answers. Other requests wait in a queue. To turn fast
    reading off for a request, send "pop": false. /health and /metrics (Prometheus) report the
    server's state.
    """
    serve_named(model, to, how)


def serve_named(
    model: str | None,
    to: ServerOptions,
    how: opt.ModelOptions,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve models until a signal arrives. Pass the URL to `on_ready` once clients can connect."""
    n_parallel = _require_usage(to, how)
    try:
        from pop_local.server import app
        from pop_local.server.access import LOOPBACK, AccessRules, parse_origin
    except ModuleNotFoundError as error:
        hint = "install the server's packages with: pip install 'pop-local[server]'"
        raise PopError(f"serving needs {error.name}", hint) from error
    keys, origins = tuple(filter(None, to.api_key or ())), tuple(map(parse_origin, to.cors or ()))
    rules = AccessRules(keys, to.host, origins, shares_cache=to.cache_scope == "shared")
    listening = app.bind(to.host, to.port)
    try:
        app.log_to_stderr(PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
        if to.models is None:
            model = model or default_model()
        prompts = open_prompt_cache(how, to.cache_ram * 2**20)
        pool = _pool(to, Opener(model or "", how, n_parallel), prompts)
    except BaseException:
        listening.close()
        raise

    def announce(url: str) -> None:
        _announce(pool, to)
        if rules.host not in LOOPBACK and not rules.api_keys:
            warn("Anyone on the network can use the model. To require a key, pass --api-key.")
        note(f"Serving a web page at {url}/ and APIs at {url}/v1 (Ctrl-C to stop)")
        on_ready(url)

    try:
        app.serve_models(pool, listening, rules, announce)
    finally:
        if prompts is not None:
            prompts.close()


def _require_usage(to: ServerOptions, how: opt.ModelOptions) -> int | None:
    """Return the number of slots (None: the model's default). Raises BadParameter."""
    if to.models is None and to.ram is not None:
        raise typer.BadParameter("this option requires --models", param_hint="--ram")
    single = {"--name": to.name, "--sidecar": how.sidecar, "--mmproj": how.mmproj}
    for name, value in single.items():
        if value and to.models is not None:
            raise typer.BadParameter("this option conflicts with --models", param_hint=name)
    return to.parallel or (1 if to.repeatable else None)


def _pool(to: ServerOptions, opener: Opener, prompts: PromptCache | None) -> "ModelPool":
    """Create a model pool. If `opener.model` is set, open that model."""
    from pop_local.server.model_listing import ModelFile, models_in, printable
    from pop_local.server.model_pool import ModelPool, ModelRegistry

    opener = replace(opener, prompt_cache=prompts)
    options: dict[str, Any] = {
        "max_waiting": to.max_waiting,
        "repeatable": to.repeatable,
        "ram_bytes": int((to.ram or 0) * 2**30),
        "strict_model": to.strict_model,
    }
    if (folder := to.models) is None:
        opened = opener()
        # Clients probably use the catalog name that the user typed.
        path = opened.engine.context.files.path
        name = to.name or (opener.model if lookup(opener.model) else printable(path.stem))
        return ModelPool.of_one(ModelFile(name, path), opened, **options)
    registry = ModelRegistry(
        lambda: models_in(folder),
        lambda path: opener(str(path)),
        opener.options.ctx,
        can_see=True,
        n_parallel=opener.n_parallel or 2,  # the largest default of a model
        **options,
    )
    return ModelPool.of_folder(folder, registry, opener.model)


def _announce(pool: "ModelPool", to: ServerOptions) -> None:
    for served in pool.loaded:
        _announce_model(served.name, served.model)
    if to.models is not None:
        names = ", ".join(pool.registry.files()) or "none yet"
        limit = f"uses up to {to.ram:g} GiB of memory" if to.ram else "keeps one model loaded"
        note(f"Models in {to.models}: {names}. The server loads models on demand and {limit}.")


def _announce_model(name: str, opened: PopModel) -> None:
    engine = opened.engine
    pruning, mmproj = engine.sequences[0].settings, engine.options.mmproj
    skipping = "reads prompts in full"
    if pruning.mode and pruning.exact:
        skipping = f"skips layers {pruning.exact} and up without any loss"
    elif pruning.mode:
        n_layer = engine.context.files.shape.n_layer
        skipping = f"uses fast reading (it skips {n_layer - pruning.boundary} of {n_layer} layers)"
    note(f"{name} {skipping}. The context length is {engine.context.n_ctx:,} tokens.")
    if mmproj and not engine.prompter.can_see:
        warn("Images need Pillow, which is not installed. Run: pip install 'pop-local[images]'")
    elif mmproj:
        note(f"Images are enabled ({mmproj.name}). Clients must send images as data: URLs.")
