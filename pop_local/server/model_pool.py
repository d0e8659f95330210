"""A server's pool of open models. Each request leases a model."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_base.numbers import size
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.model import PopModel
from pop_local.server.api_errors import ApiError, as_api_error, stopping
from pop_local.server.metrics import Metrics
from pop_local.server.model_listing import ModelFile, ModelInfo, find, printable
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import Worker

log = logging.getLogger("pop_local.server")

# Context length for which requests may be large enough, if the models' lengths are unknown.
_LONG_CTX = 131_072


@dataclass(frozen=True)
class ModelRegistry:
    """The models that a server can open, with the limits and defaults for serving them.

    `files` returns the current files, keyed by model name. `open` opens a file or raises PopError.
    `n_ctx` is the context length of each model (None: the model's default). `n_parallel` is the
    number of sequences per model. `can_see` is true if any model might be able to read images.

    `max_waiting` is the maximum queue length. `repeatable` is the default value of the request
    field `repeatable`. `ram_bytes` limits the total memory of all open models. A model that needs
    more memory than `ram_bytes` is opened only when no other model is open. If `strict_model` is
    true, requests for unknown models are refused rather than sent to the default model.
    """

    files: Callable[[], Mapping[str, Path]]
    open: Callable[[Path], PopModel]
    n_ctx: int | None
    can_see: bool
    n_parallel: int
    max_waiting: int = 256
    repeatable: bool = False
    ram_bytes: int = 0
    strict_model: bool = False

    @property
    def max_ctx(self) -> int:
        return self.n_ctx or _LONG_CTX


@dataclass(frozen=True)
class ServedModel:
    """An open model with its API name, task factory, and worker."""

    name: str
    path: Path
    model: PopModel
    tasks: TaskFactory
    worker: Worker
    needed_bytes: int

    @property
    def is_replaced(self) -> bool:
        """True if any of the model's files changed after the model was opened."""
        return bool(self.model.engine.context.files.replaced)

    def close(self) -> None:
        """Stash the model's cached rows in the prompt cache and close the model."""
        self.worker.stop()
        if self.worker.is_alive():
            self.worker.join()
        try:
            for sequence in self.model.engine.sequences:
                sequence.states.store()
        except Exception:  # such as too little memory: closing the model frees some
            log.exception("the KV cache of %s could not be stashed", self.name)
        finally:
            self.model.close()


@dataclass(eq=False)
class Lease:
    """A request's claim on a model. The model must stay open between `grant` and `end`."""

    file: ModelFile
    needed_bytes: int
    on_end: Callable[["Lease"], None]
    served: asyncio.Future[ServedModel]
    is_granted: bool = False

    def grant(self, served: ServedModel) -> None:
        self.is_granted = True
        self.served.set_result(served)

    def refuse(self, error: ApiError) -> None:
        """Answer the request with an error if the request is still waiting for its model."""
        if not self.served.done():
            self.served.set_exception(error)

    def end(self) -> None:
        self.served.cancel()
        self.on_end(self)


class ModelPool:
    """A pool that opens requested models and closes idle models to make room.

    Only `load`, `stop`, `join`, and `close` may be called from outside the event loop.
    """

    def __init__(self, registry: ModelRegistry, default: str = "") -> None:
        """Create a pool with no open models.

        The model named `default` answers requests without a model name. If `default` is "", the
        most recently requested model answers (or, before any request, the first model).
        """
        self.registry, self._default = registry, default
        self.metrics = Metrics()
        self._loaded: dict[Path, ServedModel] = {}  # least recently used first
        self._n_leases: Counter[Path] = Counter()
        self._waiting: list[Lease] = []
        self._damaged: set[Path] = set()
        self._problem = ""  # why the last attempt to open a model failed
        self._change: threading.Thread | None = None
        self._closing: Sequence[ServedModel] = ()  # models that are being closed
        self.stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.metrics.open.set_function(lambda: len(self._loaded))
        self.metrics.queue.set_function(self.n_waiting)

    @classmethod
    def of_one(
        cls,
        file: ModelFile,
        model: PopModel,
        **options: Any,
    ) -> "ModelPool":
        """Create a pool with one open model. `options` are optional fields of ModelRegistry."""
        files, engine = {file.name: file.path}, model.engine
        can_see, n = engine.prompter.can_see, len(engine.sequences)
        opened = [model]

        def open_(path: Path) -> PopModel:
            return opened.pop() if opened else PopModel(engine.options)

        n_ctx = engine.context.n_ctx
        registry = ModelRegistry(lambda: files, open_, n_ctx, can_see, n_parallel=n, **options)
        pool = cls(registry)
        pool.load(file)
        return pool

    @classmethod
    def of_folder(cls, folder: Path, registry: ModelRegistry, model: str) -> "ModelPool":
        """Create a pool for the models in a folder, and open `model` unless it is "".

        Raises PopError if the folder does not contain the model, or if the model cannot be opened.
        """
        files = registry.files()
        file = find(model, files) if model else None
        if model and file is None:
            hint = nearest_hint(model, {name: name for name in files}, "see `pop-local list`")
            raise PopError(f"the folder {folder} contains no model named {model!r}", hint)
        pool = cls(registry, file.name if file else "")
        if file:
            pool.load(file)
        else:  # a damaged file must never become the default model
            for name, path in files.items():
                pool._described(ModelFile(name, path))
        return pool

    def find(self, name: str | None) -> ModelFile | None:
        return find(name, self.registry.files()) if name else None

    @property
    def default(self) -> ModelFile | None:
        """The model that answers requests without a model name, or None if no model exists."""
        files = self.registry.files()
        requested = [served.name for served in self.loaded]
        requested += [lease.file.name for lease in self._still_waiting()]
        names = (self._default, *reversed(requested), *files)
        models = [ModelFile(name, files[name]) for name in names if name in files]
        models.sort(key=lambda file: file.path in self._damaged)
        return models[0] if models else None

    async def listed(self) -> list[ModelInfo]:
        """Return descriptions of all models. Damaged files are logged and omitted."""
        opened = self.opened
        names = {info.name for info in opened}
        files = [ModelFile(*item) for item in self.registry.files().items() if item[0] not in names]
        closed = await run_in_threadpool(lambda: [*filter(None, map(self._described, files))])
        return sorted([*opened, *closed], key=lambda info: info.name.lower())

    @property
    def loaded(self) -> list[ServedModel]:
        """The open models, from least to most recently used."""
        return list(self._loaded.values())

    @property
    def opened(self) -> list[ModelInfo]:
        return [ModelInfo.of_model(served.name, served.model) for served in self.loaded]

    async def info(self, file: ModelFile) -> ModelInfo:
        """Describe a model. Raises PopError or OSError if the file is damaged or unreadable."""
        if served := self._current(file.path):
            return ModelInfo.of_model(file.name, served.model)
        return await run_in_threadpool(self._read, file)

    def _current(self, path: Path) -> ServedModel | None:
        served = self._loaded.get(path)
        return None if served is None or served.is_replaced else served

    def _read(self, file: ModelFile) -> ModelInfo:
        info = ModelInfo.of_file(file, self.registry.n_ctx, self.registry.n_parallel)
        self._damaged.discard(file.path)
        return info

    def _described(self, file: ModelFile) -> ModelInfo | None:
        try:
            return self._read(file)
        except (PopError, OSError) as error:
            log.warning("skipping %s: %s", file.name, printable(str(error)))
            self._damaged.add(file.path)
            return None

    async def lease(self, file: ModelFile) -> Lease:
        """Create a lease for a model. The caller must call the lease's `end` method.

        Raises ApiError if the file is unreadable, the queue is full, or the server is stopping.
        """
        try:
            needed_bytes = (await self.info(file)).needed_bytes
        except (PopError, OSError) as error:
            raise self._failed(file, error) from error
        if self.stopping.is_set():
            raise stopping()
        future = asyncio.get_running_loop().create_future()
        lease = Lease(file, needed_bytes, self._ended, future)
        self._waiting = self._still_waiting()
        n_waiting = len(self._waiting)
        served = self._current(file.path)
        if served is not None and (self._change is not None or not n_waiting):
            self._grant(lease, served)
            return lease
        # Requests for an open model also wait in the queue, so that the model can become idle.
        if n_waiting >= self.registry.max_waiting:
            raise ApiError(503, f"{n_waiting} requests are waiting for models; try again later")
        self._waiting.append(lease)
        self._advance()
        return lease

    def _still_waiting(self) -> list[Lease]:
        return [lease for lease in self._waiting if not lease.served.done()]

    def n_waiting(self) -> int:
        """Return the number of requests that are waiting for a slot or for a model to be opened."""
        return len(self._still_waiting()) + sum(served.worker.n_waiting() for served in self.loaded)

    def _grant(self, lease: Lease, served: ServedModel) -> None:
        self._loaded[served.path] = self._loaded.pop(served.path)
        self._n_leases[served.path] += 1
        lease.grant(served)

    def _ended(self, lease: Lease) -> None:
        if lease.is_granted:
            self._n_leases[lease.file.path] -= 1
        self._advance()

    def _advance(self) -> None:
        """Grant the pending leases in order, and open a model if the next lease requires it."""
        while self._change is None and not self.stopping.is_set():
            self._waiting = self._still_waiting()
            if not self._waiting:
                return
            first = self._waiting[0]
            if served := self._current(first.file.path):
                for lease in self._for_the_same(first):
                    self._grant(lease, served)
            elif (idle := self._to_close(first)) is not None:
                self._start_change(first, idle)
            else:
                return

    def _for_the_same(self, lease: Lease) -> list[Lease]:
        return [
            waiting for waiting in self._still_waiting() if waiting.file.path == lease.file.path
        ]

    def _to_close(self, lease: Lease) -> list[ServedModel] | None:
        """Return the idle models that must be closed before the lease's model can be opened.

        Returns None if busy models leave too little memory. Also returns None if the leased model
        is busy and its file has been replaced.
        """
        limit = self.registry.ram_bytes
        n_bytes = lease.needed_bytes + sum(served.needed_bytes for served in self.loaded)
        idle: list[ServedModel] = []
        for served in self.loaded:
            is_replaced, is_busy = served.path == lease.file.path, self._n_leases[served.path] > 0
            if is_replaced and is_busy:
                return None
            if is_replaced or (n_bytes > limit and not is_busy):
                idle.append(served)
                n_bytes -= served.needed_bytes
        return idle if n_bytes <= limit or len(idle) == len(self._loaded) else None

    def load(self, file: ModelFile) -> ServedModel:
        """Open a model without starting its worker. Raises PopError or StoppedError."""
        with stopped_by(self.stopping.is_set):
            model = self.registry.open(file.path)
        tasks = TaskFactory(model, repeatable=self.registry.repeatable)
        worker = Worker(model, self.metrics, self.registry.max_waiting)
        needed_bytes = ModelInfo.of_model(file.name, model).needed_bytes
        served = ServedModel(file.name, file.path, model, tasks, worker, needed_bytes)
        self._loaded[file.path] = served
        return served

    def _start_change(self, lease: Lease, idle: list[ServedModel]) -> None:
        for served in idle:
            del self._loaded[served.path]
        self._closing = idle
        loop = asyncio.get_running_loop()

        def change() -> None:
            error: Exception | None = None
            try:
                for served in idle:
                    served.close()
                    log.info("closed %s", served.name)
                worker = self.load(lease.file).worker
                if self.stopping.is_set():
                    worker.stop()
                worker.start()
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed, lease, error)

        self._change = threading.Thread(target=change, name="pop-local loading", daemon=True)
        self._change.start()

    def _changed(self, lease: Lease, error: Exception | None) -> None:
        self._change, self._closing, self._problem = None, (), ""
        if error is None:
            log.info("opened %s", lease.file.name)
            if 0 < self.registry.ram_bytes < lease.needed_bytes:
                needed, limit = size(lease.needed_bytes), size(self.registry.ram_bytes)
                message = "%s needs about %s of memory, but --ram allows only %s"
                log.warning(message, lease.file.name, needed, limit)
        else:
            failed = self._failed(lease.file, error)
            for waiting in self._for_the_same(lease):
                waiting.refuse(failed)
        self._advance()

    def _failed(self, file: ModelFile, error: Exception) -> ApiError:
        if self.stopping.is_set():
            return stopping()
        is_expected = isinstance(error, PopError | OSError)
        reason = as_api_error(error).detail
        log.error("cannot open %s: %s", file.name, reason, exc_info=None if is_expected else error)
        # /health needs no key, and the reason may contain a path.
        self._problem = f"cannot open {file.name}: see the server log for details"
        return ApiError(500, f"cannot open {file.name}: {reason}", param="model")

    def start(self) -> None:
        """Start the open models' workers. Must be called from the event loop."""
        self._loop = asyncio.get_running_loop()
        for served in self.loaded:
            served.worker.start()

    def stop(self) -> None:
        """Abort answers and model loads. Refuse waiting requests. May be called from any thread."""
        self.stopping.set()
        for served in self.loaded:
            served.worker.stop()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._refuse_all)

    def _refuse_all(self) -> None:
        for lease in self._waiting:
            lease.refuse(stopping())

    def health(self) -> dict[str, Any]:
        """Return /health's fields. Raises ApiError if a model hangs or the only model is unusable.

        `replaced` lists the open models whose files were replaced. If a model's file was replaced,
        the model is reopened for its next request.
        """
        in_memory = [*self.loaded, *self._closing]
        if hung_s := max((served.worker.hung_s() for served in in_memory), default=0.0):
            raise ApiError(503, f"the model has not responded for {hung_s:.0f} s")
        replaced = [served.name for served in self.loaded if served.is_replaced]
        is_usable = len(replaced) < len(self._loaded)
        if self._problem and not is_usable and len(self.registry.files()) == 1:
            raise ApiError(503, self._problem)
        return {"status": "ok"} | ({"replaced": replaced} if replaced else {})

    def join(self) -> None:
        """Wait until no thread is using a model. Must be called after `stop`."""
        if (change := self._change) is not None:
            change.join()
        for served in self.loaded:
            if served.worker.is_alive():
                served.worker.join()

    def close(self) -> None:
        self.stop()
        self.join()
        for served in self.loaded:
            served.model.close()
        self._loaded.clear()
