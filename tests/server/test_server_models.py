"""Several models: opened on demand, leased, and closed to make room."""

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.cache.saved_states import SavedStates
from pop_local.engine.refill import Refiller
from pop_local.server.api_errors import ApiError
from pop_local.server.app import create_app
from pop_local.server.model_listing import ModelFile
from pop_local.server.model_pool import Lease, ModelPool
from support.calls import opened, wait_for
from support.converted import converted
from support.library import NAMES, Library, library_client
from support.server_requests import LONG, N_CTX, complete, text_of
from support.serving import LOCAL, metric_values, served


def test_one_model_is_open_at_a_time(library, expected):
    with library_client(library) as client:
        for name in ("one", "two", "one", "TWO", "two:LATEST", "two.gguf"):
            answer = complete(client, model=name).json()
            model_name = name.lower().removesuffix(":latest").removesuffix(".gguf")
            assert answer["model"] == model_name
            assert answer["choices"][0]["text"] == expected[model_name]
            assert "x-model" not in complete(client, model=name).headers
            assert library.open_ones == [model_name]
        assert [model.engine.context.files.path.stem for model in library.models] == [
            "one",
            "two",
            "one",
            "two",
        ]
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("pop-local model") == 1


def test_get_requests_leave_models_unchanged(library):
    paths = ("props", "v1/models", "v1/models/two", "api/tags", "api/ps", "health", "metrics")
    with library_client(library) as client:
        complete(client, model="one", max_tokens=1)
        for path in paths:
            assert client.get(f"/{path}", params={"model": "two"}).status_code == 200
        closed = client.get("/props", params={"model": "two"}).json()
        opened = client.get("/props", params={"model": "one"}).json()
        assert (library.open_ones, library.n_tried) == (["one"], 1)
    assert (closed["model_alias"], closed["is_sleeping"]) == ("two", True)
    assert (opened["model_alias"], opened["is_sleeping"]) == ("one", False)
    assert closed["chat_template"] == opened["chat_template"]
    assert closed["default_generation_settings"] == opened["default_generation_settings"]


def test_stream_keeps_its_model_open(library, expected):
    body = {"model": "one", "prompt": LONG, "temperature": 0, "max_tokens": 200, "stream": True}
    with library_client(library) as client, ThreadPoolExecutor(1) as other:
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = other.submit(complete, client, model="two")
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert len("".join(chunk["choices"][0]["text"] for chunk in chunks)) > len(expected["one"])
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert text_of(answer.result()) == expected["two"]


def test_models_stay_open_within_ram(library, expected):
    with library_client(library, ram_bytes=1 << 40) as client:
        for name in NAMES * 2:
            assert text_of(complete(client, model=name)) == expected[name]
        assert library.open_ones == list(NAMES)
        (first, *_) = library.behind.loaded
    library.models.clear()
    with library_client(library, ram_bytes=int(first.needed_bytes * 2.5)) as client:
        for name in ("one", "two", "one", "three"):
            assert text_of(complete(client, model=name)) == expected[name]
        assert library.open_ones == ["one", "three"]  # two is the least recently used
        figures = metric_values(client)
        assert figures["pop_models_open"] == 2 and figures["pop_queue_length"] == 0


def test_model_beyond_ram_closes_other_models(library, expected, caplog):
    with library_client(library, ram_bytes=1000) as client:
        for name in ("one", "two"):
            assert text_of(complete(client, model=name)) == expected[name]
            assert library.open_ones == [name]
    assert "one needs about" in caplog.text


@pytest.mark.parametrize(("ram_bytes", "n_parallel"), [(0, 1), (0, 2), (1 << 40, 1)])
def test_concurrent_requests_for_two_models_complete(library, expected, ram_bytes, n_parallel):
    library.n_parallel = n_parallel

    def ask(number: int) -> list[bool]:
        matches = []
        for turn in range(8):
            name = ("one", "two")[(number + turn) % 2]
            matches.append(text_of(complete(client, model=name)) == expected[name])
        return matches

    with library_client(library, ram_bytes=ram_bytes) as client, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [[True] * 8] * 8
    if ram_bytes:
        assert len(library.models) == 2


# --- order of requests


@asynccontextmanager
async def begun(models: ModelPool) -> AsyncIterator[ModelPool]:
    models.start()
    try:
        yield models
    finally:
        models.stop()
        await asyncio.to_thread(models.close)


def file_of(library: Library, name: str) -> ModelFile:
    return ModelFile(name, library.folder / f"{name}.gguf")


@pytest.mark.parametrize("n_files", [0, 2])  # --ram in models: with K/V, one fits and two do not
def test_busy_model_cannot_starve_other_models(library, n_files):
    ram_bytes = n_files * (library.folder / "one.gguf").stat().st_size

    async def take_turns() -> None:
        registry = replace(library.registry(), max_waiting=2, ram_bytes=ram_bytes)
        async with begun(ModelPool(registry)) as models:

            async def ask(name: str) -> Lease:
                return await models.lease(file_of(library, name))

            first = await ask("one")
            assert (await first.served).name == "one"
            another = await ask("one")  # no request waits
            second, third = await ask("two"), await ask("one")
            with pytest.raises(ApiError, match="2 requests are waiting for models"):
                await ask("one")
            first.end()
            assert not second.served.done() and library.open_ones == ["one"]
            another.end()
            assert (await second.served).name == "two"
            assert models._change is None and library.open_ones == ["two"]
            second.end()
            assert (await third.served).name == "one"
            third.end()

    asyncio.run(asyncio.wait_for(take_turns(), 60))


def test_all_waiting_requests_get_an_opened_model(library):
    library.may_open.clear()

    async def wait() -> None:
        async with begun(ModelPool(library.registry())) as models:
            names = ["one", "two", "one", "two", "one"]
            leases = [await models.lease(file_of(library, name)) for name in names]
            library.may_open.set()
            for lease in (leases[0], leases[2], leases[4], leases[1], leases[3]):
                await lease.served
                lease.end()
            assert [model.engine.context.files.path.stem for model in library.models] == [
                "one",
                "two",
            ]

    asyncio.run(asyncio.wait_for(wait(), 60))


async def sent(app: Starlette, gone: asyncio.Event, **body) -> int:
    """Return the status of a completion whose client disconnects when `gone` is set."""
    statuses, is_sent = [], False

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": json.dumps(body).encode()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    await app(scope | {"headers": [(b"host", b"localhost")]}, receive, send)
    return statuses[0]


def test_disconnect_during_loading_ends_the_wait(library):
    library.may_open.clear()
    models = ModelPool(library.registry())
    app = create_app(models, LOCAL)

    async def hang_up() -> None:
        async with app.router.lifespan_context(app):
            gone, stays = asyncio.Event(), asyncio.Event()
            first = asyncio.create_task(sent(app, gone, model="one", prompt="a"))
            second = asyncio.create_task(sent(app, gone, model="two", prompt="a"))
            while models.n_waiting() < 2:
                await asyncio.sleep(0.01)
            gone.set()
            assert (await first, await second) == (499, 499)
            assert models.n_waiting() == 0
            library.may_open.set()
            assert await sent(app, stays, model="three", prompt="a") == 200
            assert library.open_ones == ["three"]
            assert len(library.models) == 2  # no request waited for two
            stays.set()

    asyncio.run(asyncio.wait_for(hang_up(), 60))
    models.close()


def test_shutdown_refuses_waiting_requests(library):
    library.may_open.clear()
    models = ModelPool(library.registry())

    async def end() -> None:
        models.start()
        leases = [await models.lease(file_of(library, name)) for name in ("one", "two")]
        models.stop()
        for lease in leases:
            with pytest.raises(ApiError, match="stopping"):
                await lease.served
            lease.end()
        library.may_open.set()
        await asyncio.to_thread(models.join)
        with pytest.raises(ApiError, match="stopping"):
            await models.lease(file_of(library, "one"))

    asyncio.run(asyncio.wait_for(end(), 60))
    models.close()
    assert library.open_ones == []


SLOW = """
import time
from pop_local.engine.llama.backend import bindings
progress = bindings().llama_progress_callback

def slow(callback):
    def wait(*state):
        print("a tensor", flush=True)
        time.sleep(0.2)
        return callback(*state)
    return progress(wait)

bindings().llama_progress_callback = slow
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_signal_aborts_loading(folder):
    with served(f"--models={folder}", changed=SLOW) as server, ThreadPoolExecutor(1) as other:
        waiting = other.submit(server.post, "completions", model="one", prompt="a")
        wait_for(lambda: "a tensor" in server.log)
        begun_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 143
        assert time.monotonic() - begun_s < 6  # loading would take 16 s
        assert waiting.result().status_code == 503
        assert "the server is stopping" in waiting.result().text
        assert "Traceback" not in server.log and "killing the process" not in server.log


def test_refilled_model_can_be_closed(folder, tmp_path, monkeypatch):
    for name in ("one", "two"):
        converted(folder / f"{name}.gguf", tmp_path, boundary=4)
    works = threading.Event()

    def refill(self, should_stop):
        works.set()
        while not should_stop():
            time.sleep(0.001)
        return 0

    monkeypatch.setattr(Refiller, "refill", refill)
    library = Library(tmp_path)
    monkeypatch.setattr(library, "open", lambda path: opened(path, n_ctx=N_CTX, keep_states=True))
    with library_client(library) as client:
        for name in ("one.pop", "two.pop", "one.pop"):
            works.clear()
            answer = complete(client, model=name).json()
            assert answer["model"] == name
            assert answer["usage"]["pop"]["n_pruned"] > 0
            assert works.wait(30)


def test_model_closes_if_storing_its_prompt_fails(library, expected, monkeypatch):
    def store(self):
        raise MemoryError

    with library_client(library, ram_bytes=1 << 40) as client:
        for name in ("one", "two"):
            complete(client, model=name)
        monkeypatch.setattr(SavedStates, "store", store)
        library.behind.registry = replace(library.behind.registry, ram_bytes=0)
        assert text_of(complete(client, model="three")) == expected["three"]
        assert library.open_ones == ["three"]


@pytest.mark.parametrize("n_parallel", [1, 2])
def test_cached_prompts_survive_closing(library, expected, n_parallel):
    library.prompts, library.n_parallel = PromptCache(1 << 26), n_parallel
    with library_client(library) as client:
        for name in ("one", "two", "one", "two"):
            answer = complete(client, model=name)
        assert text_of(answer) == expected["two"]
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
