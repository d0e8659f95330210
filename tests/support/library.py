"""A folder of tiny models, and a server for them in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.model import PopModel
from pop_local.server.app import create_app
from pop_local.server.model_listing import models_in
from pop_local.server.model_pool import ModelPool, ModelRegistry
from support.calls import opened
from support.server_requests import N_CTX
from support.serving import LOCAL, app_client

NAMES = ("one", "three", "two")


@dataclass
class Library:
    """A loader of a folder's models; `models` are the open ones in order."""

    folder: Path
    models: list[PopModel] = field(default_factory=list)
    prompts: PromptCache | None = None
    may_open: threading.Event = field(default_factory=threading.Event)
    problem: Exception | None = None
    n_tried: int = 0
    n_parallel: int = 1
    behind: Any = None

    def __post_init__(self) -> None:
        self.may_open.set()

    def open(self, path: Path) -> PopModel:
        assert self.may_open.wait(60)
        self.n_tried += 1
        if self.problem is not None:
            raise self.problem
        model = opened(path, n_ctx=N_CTX, n_parallel=self.n_parallel, prompt_cache=self.prompts)
        self.models.append(model)
        return model

    @property
    def open_ones(self) -> list[str]:
        return [
            model.engine.context.files.path.stem
            for model in self.models
            if not model.engine.context.is_closed
        ]

    def registry(self) -> ModelRegistry:
        return ModelRegistry(
            lambda: models_in(self.folder),
            self.open,
            N_CTX,
            can_see=False,
            n_parallel=self.n_parallel,
        )


@contextmanager
def library_client(library: Library, *, default: str = "", **how) -> Iterator[TestClient]:
    library.behind = models = ModelPool(replace(library.registry(), **how), default)
    with app_client(create_app(models, LOCAL)) as client:
        yield client
    assert not any(models._n_leases.values())
    assert models.n_waiting() == 0
    models.close()
    assert library.open_ones == []
