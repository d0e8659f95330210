"""The open models of a server: each request leases one, and idle ones make room for others."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from pop_converter.base.errors import PopError
from pop_converter.base.numbers import size
from pop_local.engine.learning.learned_fit import Fitter
from pop_local.engine.llama.interrupt import stopped_by
from pop_local.engine.llama.loading import DEFAULT_CTX
from pop_local.engine.model import PopModel
from pop_local.engine.prompt.prompt import Prompt
from pop_local.server.api_errors import ApiError, as_api_error
from pop_local.server.metrics import Metrics
from pop_local.server.model_listing import ModelFile, ModelInfo, find
from pop_local.server.task_factory import TaskFactory
from pop_local.server.worker import STOPPING, Worker

log = logging.getLogger("pop_local.server")


@dataclass(frozen=True)
class ModelRegistry:
    """Where models come from.

    `files`: those that are there now, by name. `open` may raise PopError. `teach` makes the
    teacher of an open model, None where it does not learn. `n_ctx`: the context of each, None for
    its own. `can_see`: whether one might. `n_parallel`: sequences of each.
    """

    files: Callable[[], Mapping[str, Path]]
    open: Callable[[Path], PopModel]
    teach: Callable[[PopModel], Fitter | None]
    n_ctx: int | None
    can_see: bool
    n_parallel: int

    @property
    def most_ctx(self) -> int:
        return self.n_ctx or DEFAULT_CTX


@dataclass(frozen=True)
class ServedModel:
    """An open model by its name in the API, what makes its tasks, and the thread that has it."""

    name: str
    path: Path
    model: PopModel
    tasks: TaskFactory
    worker: Worker
    needed_bytes: int

    def leave(self) -> None:
        """Close the model; what its KV cache holds is kept for when it is opened again."""
        self.worker.stop()
        if self.worker.is_alive():
            self.worker.join()
        try:
            for cache, _ in self.model.sequences:
                cache.stash(Prompt([]))
        except Exception:  # such as a lack of memory; whoever waits for it is to get it
            log.exception("what %s had cached is not kept", self.name)
        finally:
            self.model.close()


class Lease:
    """A request's claim to a model: `served` comes once that is open, and is kept until `end`."""

    def __init__(
        self, file: ModelFile, needed_bytes: int, on_end: Callable[["Lease"], None]
    ) -> None:
        self.file, self.needed_bytes = file, needed_bytes
        self.served: asyncio.Future[ServedModel] = asyncio.get_running_loop().create_future()
        self.is_granted = False
        self._on_end = on_end

    def grant(self, served: ServedModel) -> None:
        self.is_granted = True
        self.served.set_result(served)

    def refuse(self, error: ApiError) -> None:
        """Without effect on one that is granted."""
        if not self.served.done():
            self.served.set_exception(error)

    def end(self) -> None:
        self.served.cancel()
        self._on_end(self)


class ModelPool:
    """Opens models as they are asked for, one at a time, and closes idle ones before.

    All but `load`, `stop`, `join` and `close` is for the event loop. `metrics` are of all models.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        *,
        max_waiting: int = 256,
        repeatable: bool = False,
        ram_bytes: int = 0,
        default: str = "",
    ) -> None:
        """`ram_bytes`: for all that are open; a model that takes more is the only one.

        `default`: the model that answers where none is named, "" for the one that was asked for
        last, at first the first one.
        """
        self.registry = registry
        self.metrics = Metrics()
        self._max_waiting, self._repeatable = max_waiting, repeatable
        self._ram_bytes, self._default = ram_bytes, default
        self._loaded: dict[Path, ServedModel] = {}  # the least recently used first
        self._n_leases: Counter[Path] = Counter()
        self._waiting: list[Lease] = []
        self._damaged: set[Path] = set()
        self._change: threading.Thread | None = None
        self._leaving: Sequence[ServedModel] = ()  # in the change
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        metrics = self.metrics
        metrics.open.set_function(lambda: len(self._loaded))
        metrics.queue.set_function(self.n_waiting)
        metrics.unread.set_function(partial(self._total, lambda worker: worker.n_unread()))
        metrics.refillable.set_function(partial(self._total, lambda worker: worker.n_refillable()))

    @classmethod
    def of_one(
        cls,
        file: ModelFile,
        model: PopModel,
        teach: Callable[[PopModel], Fitter | None],
        **how: Any,
    ) -> "ModelPool":
        """Make models of a single one, which is open already; `how` as for the constructor."""
        files, n = {file.name: file.path}, len(model.sequences)
        registry = ModelRegistry(
            lambda: files, lambda _: model, teach, model.n_ctx, model.can_see, n
        )
        models = cls(registry, **how)
        models.load(file)
        return models

    # By name

    def find(self, name: str | None) -> ModelFile | None:
        return find(name, self.registry.files()) if name else None

    @property
    def default(self) -> ModelFile | None:
        """The model that answers where none is named; None where there is none at all."""
        files = self.registry.files()
        asked_for = [served.name for served in self.loaded]
        asked_for += [lease.file.name for lease in self._still_waiting()]
        names = (self._default, *reversed(asked_for), *files)
        found = [ModelFile(name, files[name]) for name in names if name in files]
        return next(
            (file for file in found if file.path not in self._damaged), next(iter(found), None)
        )

    @property
    def names(self) -> list[str]:
        return list(self.registry.files())

    async def listed(self) -> list[ModelInfo]:
        """Describe all models; those whose files are damaged are left out, and named in the log."""
        opened = self.opened
        here = {about.name for about in opened}
        files = [ModelFile(*each) for each in self.registry.files().items() if each[0] not in here]
        closed = await run_in_threadpool(lambda: [*filter(None, map(self._described, files))])
        return sorted([*opened, *closed], key=lambda about: about.name.lower())

    @property
    def loaded(self) -> list[ServedModel]:
        """The open models, the one that was used last at the end."""
        return list(self._loaded.values())

    @property
    def opened(self) -> list[ModelInfo]:
        return [ModelInfo.of_model(served.name, served.model) for served in self.loaded]

    async def about(self, file: ModelFile) -> ModelInfo:
        """Describe a model. Raises PopError for a damaged file."""
        if served := self._loaded.get(file.path):
            return ModelInfo.of_model(file.name, served.model)
        return await run_in_threadpool(self._read, file)

    def check(self) -> None:
        """Read the headers of all files: no damaged one answers where none is named."""
        for name, path in self.registry.files().items():
            self._described(ModelFile(name, path))

    def _read(self, file: ModelFile) -> ModelInfo:
        about = ModelInfo.of_file(file, self.registry.n_ctx, self.registry.n_parallel)
        self._damaged.discard(file.path)
        return about

    def _described(self, file: ModelFile) -> ModelInfo | None:
        try:
            return self._read(file)
        except (PopError, OSError) as error:
            log.warning("%s is left out: %s", file.name, error)
            self._damaged.add(file.path)
            return None

    # Leases

    async def lease(self, file: ModelFile) -> Lease:
        """Begin a lease; whoever has it ends it. Raises ApiError when too many wait already."""
        try:
            needed_bytes = (await self.about(file)).needed_bytes
        except (PopError, OSError) as error:
            raise self._failed(file, error) from error
        if self._stopping.is_set():
            raise ApiError(503, STOPPING)
        lease = Lease(file, needed_bytes, self._ended)
        self._waiting = self._still_waiting()
        n_waiting = len(self._waiting)
        served = self._loaded.get(file.path)
        if served is not None and (self._change is not None or not n_waiting):
            self._grant(lease, served)
            return lease
        # Those that ask for an open model wait as well: it might never be idle for the first one.
        if n_waiting >= self._max_waiting:
            raise ApiError(503, f"{n_waiting} requests wait for models already; try again later")
        self._waiting.append(lease)
        self._advance()
        return lease

    def _still_waiting(self) -> list[Lease]:
        return [lease for lease in self._waiting if not lease.served.done()]

    def n_waiting(self) -> int:
        """Requests that wait for any model, open or not."""
        return len(self._still_waiting()) + self._total(lambda worker: worker.n_waiting())

    def _total(self, figure: Callable[[Worker], int]) -> int:
        return sum(figure(served.worker) for served in self.loaded)

    def _grant(self, lease: Lease, served: ServedModel) -> None:
        self._loaded[served.path] = self._loaded.pop(served.path)
        self._n_leases[served.path] += 1
        lease.grant(served)

    def _ended(self, lease: Lease) -> None:
        if lease.is_granted:
            self._n_leases[lease.file.path] -= 1
        self._advance()

    def _advance(self) -> None:
        """Grant what waits, in order, and begin to open what the first one waits for."""
        while self._change is None and not self._stopping.is_set():
            self._waiting = self._still_waiting()
            if not self._waiting:
                return
            first = self._waiting[0]
            if served := self._loaded.get(first.file.path):
                for lease in self._for_the_same(first):  # a change for each would be slow
                    self._grant(lease, served)
            elif (leaving := self._to_close(first.needed_bytes)) is not None:
                self._begin(first, leaving)
            else:
                return

    def _for_the_same(self, lease: Lease) -> list[Lease]:
        return [one for one in self._still_waiting() if one.file.path == lease.file.path]

    def _to_close(self, needed_bytes: int) -> list[ServedModel] | None:
        """Choose idle models to close; None while busy ones leave no room."""
        n_bytes = needed_bytes + sum(served.needed_bytes for served in self._loaded.values())
        leaving: list[ServedModel] = []
        for served in self.loaded:
            if n_bytes > self._ram_bytes and not self._n_leases[served.path]:
                leaving.append(served)
                n_bytes -= served.needed_bytes
        is_alone = len(leaving) == len(self._loaded)
        return leaving if is_alone or n_bytes <= self._ram_bytes else None

    # Opening and closing

    def load(self, file: ModelFile) -> ServedModel:
        """Open a model; its thread is yet to be started. Raises PopError."""
        with stopped_by(self._stopping.is_set):
            model = self.registry.open(file.path)
        tasks = TaskFactory(model, repeatable=self._repeatable)
        worker = Worker(model, self.metrics, self._max_waiting, self.registry.teach(model))
        needed_bytes = ModelInfo.of_model(file.name, model).needed_bytes
        served = ServedModel(file.name, file.path, model, tasks, worker, needed_bytes)
        self._loaded[file.path] = served
        return served

    def _begin(self, lease: Lease, leaving: list[ServedModel]) -> None:
        for served in leaving:
            del self._loaded[served.path]
        self._leaving = leaving
        loop = asyncio.get_running_loop()

        def change() -> None:
            error: Exception | None = None
            try:
                for served in leaving:
                    served.leave()
                    log.info("%s was closed", served.name)
                worker = self.load(lease.file).worker
                if self._stopping.is_set():
                    worker.stop()
                worker.start()
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed, lease, error)

        self._change = threading.Thread(target=change, name="pop-local loading", daemon=True)
        self._change.start()

    def _changed(self, lease: Lease, error: Exception | None) -> None:
        self._change, self._leaving = None, ()
        if error is None:
            log.info("%s was opened", lease.file.name)
            if 0 < self._ram_bytes < lease.needed_bytes:
                asked, given = size(lease.needed_bytes), size(self._ram_bytes)
                log.warning(
                    "%s takes about %s, more than the %s given", lease.file.name, asked, given
                )
        else:
            for each in self._for_the_same(lease):
                each.refuse(self._failed(lease.file, error))
        self._advance()

    def _failed(self, file: ModelFile, error: Exception) -> ApiError:
        """Return why a model is not there, once more for each request, and log it."""
        if self._stopping.is_set():
            return ApiError(503, STOPPING)
        if not isinstance(error, PopError | OSError):
            log.error("%s cannot be loaded", file.name, exc_info=error)
        told = as_api_error(error).detail
        log.error("%s cannot be loaded: %s", file.name, told)
        return ApiError(500, f"{file.name} cannot be loaded: {told}", param="model")

    # From start to end

    def start(self) -> None:
        """Let the models that are open work. Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        for served in self.loaded:
            served.worker.start()

    def stop(self) -> None:
        """End running answers and loading, and refuse what waits. Call it anywhere."""
        self._stopping.set()
        for served in self.loaded:
            served.worker.stop()
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._refuse_all)

    def _refuse_all(self) -> None:
        for lease in self._waiting:
            lease.refuse(ApiError(503, STOPPING))

    def silent_s(self) -> float:
        """Return for how many seconds a model has hung, 0 while none has."""
        in_memory = [*self.loaded, *self._leaving]
        return max((served.worker.silent_s() for served in in_memory), default=0.0)

    def join(self) -> None:
        """Wait until no thread uses a model any more; `stop` comes before."""
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
