"""Several clients: fair shares of expensive work, and separate caches."""

import asyncio
import hashlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from pop_local.engine.cache.prompt_cache import PromptCache
from pop_local.engine.decode.grammar import Grammar, GrammarError
from pop_local.server.access import AccessRules
from pop_local.server.api_errors import ApiError
from pop_local.server.client_limits import ClientLimiter
from support.calls import opened, wait_for
from support.server_requests import LONG, N_CTX, NAME, text_of
from support.serving import Served, app_client, app_of, served

ALICE, BOB = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
KEYS = AccessRules(api_keys=("alice", "bob"))


def ask(client: TestClient, headers: dict[str, str], **body: Any):
    body = {"prompt": LONG, "temperature": 0, "max_tokens": 8} | body
    return client.post("/v1/completions", json=body, headers=headers)


# --- shares


async def _hold(limiter: ClientLimiter, client: str, began: list[str], ends: asyncio.Event) -> None:
    async with limiter.turn(client):
        began.append(client)
        await ends.wait()


def test_queued_clients_alternate():
    async def run() -> list[str]:
        limiter = ClientLimiter(1, 1, 8)
        began: list[str] = []
        order = [*["a"] * 4, "b", "b", "c"]
        ends = asyncio.Event()
        tasks = [asyncio.create_task(_hold(limiter, client, began, ends)) for client in order]
        await asyncio.sleep(0.01)
        ends.set()
        await asyncio.gather(*tasks)
        return began

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b", "a", "a"]


def test_repeatable_requests_do_not_block_other_clients(path):
    """Each of them runs alone, so several in a row would stop all other answers."""
    with (
        opened(path, n_ctx=N_CTX, n_parallel=2) as model,
        app_client(app_of(model, NAME, rules=KEYS)) as client,
        ThreadPoolExecutor(5) as clients,
    ):
        ask(client, BOB)
        sent = {"repeatable": True, "grammar": "root ::= [a-z] root", "max_tokens": 200}
        alone = [clients.submit(ask, client, ALICE, **sent) for _ in range(4)]
        app: Any = client.app
        (served_model,) = app.state.models.loaded
        wait_for(lambda: served_model.worker.running)
        assert ask(client, BOB).status_code == 200
        assert sum(request.done() for request in alone) <= 2
        assert all(request.result().status_code == 200 for request in alone)


def test_client_cannot_fill_the_queue():
    async def run() -> None:
        limiter, ends = ClientLimiter(3, 2, 2), asyncio.Event()
        began: list[str] = []
        tasks = [asyncio.create_task(_hold(limiter, "a", began, ends)) for _ in range(4)]
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="this client already has 2 requests waiting") as caught:
            async with limiter.turn("a"):
                pass
        assert caught.value.status_code == 429
        tasks.append(asyncio.create_task(_hold(limiter, "b", began, ends)))
        await asyncio.sleep(0.01)
        assert began == ["a", "a", "b"]
        tasks[2].cancel()  # frees a waiting place
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(_hold(limiter, "a", began, ends)))
        ends.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert began.count("a") == 4

    asyncio.run(run())


@pytest.fixture(scope="module")
def model(path):
    model = opened(path, n_ctx=N_CTX)
    yield model
    model.close()


def test_grammar_bombs_do_not_delay_other_clients(model, monkeypatch):
    """Another client's grammar compiles while a client's slow grammars wait."""
    may_end = threading.Event()
    of_schema = Grammar.of_schema

    def slow(schema: Any) -> Grammar:
        if "bomb" in schema:
            assert may_end.wait(60)
            raise GrammarError("the JSON schema exceeds the limit (3 s or 512 MiB)")
        return of_schema(schema)

    monkeypatch.setattr(Grammar, "of_schema", slow)
    app = app_of(model, NAME, rules=KEYS, max_waiting=3)
    form = {"type": "json_object", "schema": {"bomb": 1}}
    with app_client(app) as client, ThreadPoolExecutor(8) as threads:
        bombs = [threads.submit(ask, client, ALICE, response_format=form) for _ in range(5)]
        wait_for(lambda: any(bomb.done() for bomb in bombs))
        refused = next(bomb.result() for bomb in bombs if bomb.done())
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "5"
        short = {"type": "json_object", "schema": {"const": "a"}}
        answer = ask(client, BOB, response_format=short, max_tokens=20)
        assert text_of(answer) == '"a"'
        may_end.set()
        assert sorted(bomb.result().status_code for bomb in bombs) == [400] * 4 + [429]


# --- caches


def n_cached(client: TestClient, headers: dict[str, str]) -> int:
    reply = ask(client, headers, max_tokens=1).json()
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("n_parallel", [1, 2, 3])
def test_cached_tokens_reveal_no_other_clients_prompt(path, n_parallel):
    prompts = PromptCache(1 << 26)
    model = opened(path, n_ctx=N_CTX, n_parallel=n_parallel, prompt_cache=prompts)
    with app_client(app_of(model, NAME, rules=KEYS)) as client:
        assert n_cached(client, ALICE) == 0
        assert n_cached(client, BOB) == 0
        assert n_cached(client, ALICE) > 100
        assert n_cached(client, BOB) > 100
    model.close()


@pytest.mark.parametrize(
    ("rules", "addresses", "is_shared"),
    [
        (AccessRules(api_keys=("alice", "bob"), shares_cache=True), ("::1", "::1"), True),
        (AccessRules(host="0.0.0.0"), ("127.0.0.1", "::1"), True),
        (AccessRules(host="0.0.0.0"), ("127.0.0.1", "10.0.0.9"), False),
        (AccessRules(host="0.0.0.0", shares_cache=True), ("10.0.0.8", "10.0.0.9"), True),
    ],
)
def test_shared_cache_serves_all_clients(path, rules, addresses, is_shared):
    model = opened(path, n_ctx=N_CTX)
    with app_client(app_of(model, NAME, rules=rules)) as server:
        counts = []
        for address, headers in zip(addresses, (ALICE, BOB), strict=True):
            client = TestClient(server.app, "http://localhost:8080", client=(address, 1))
            client.portal = server.portal
            counts.append(n_cached(client, headers))
        assert (counts[0], counts[1] > 100) == (0, is_shared)
    model.close()


def test_stored_responses_belong_to_one_client(model):
    body = {"input": LONG, "max_output_tokens": 2}
    with app_client(app_of(model, NAME, rules=KEYS)) as client:
        name = client.post("/v1/responses", json=body, headers=ALICE).json()["id"]
        path, later = f"/v1/responses/{name}", body | {"previous_response_id": name}
        assert client.get(path, headers=BOB).status_code == 404
        assert client.get(f"{path}/input_items", headers=BOB).status_code == 404
        assert client.delete(path, headers=BOB).status_code == 404
        assert client.post("/v1/responses", json=later, headers=BOB).status_code == 400
        assert client.post("/v1/responses", json=later, headers=ALICE).status_code == 200
        assert client.delete(path, headers=ALICE).status_code == 200


def test_slots_hide_other_clients_prompt_lengths(model):
    app = app_of(model, NAME, rules=KEYS)
    (served_model,) = app.state.models.loaded
    alice = KEYS.cache_scope(hashlib.sha256(b"alice").hexdigest()[:16])
    job: Any = SimpleNamespace(read=(3, 9), left_s=1.0)
    with app_client(app) as client:
        served_model.worker.running[0] = job
        model.engine.sequences[0].states.set_scope(alice)
        [[own], [other]] = (
            client.get("/slots", headers=headers).json() for headers in (ALICE, BOB)
        )
        del served_model.worker.running[0]
    assert (own["n_read"], own["n_rows"], own["left_s"]) == (3, 9, 1.0)
    assert other.keys() == own.keys() - {"n_read", "n_rows", "left_s", "n_behind", "job"}
    assert other["is_processing"]


def test_single_key_shares_cache_with_commands():
    rules = AccessRules(api_keys=("alice",))
    assert {rules.cache_scope(name) for name in ("0123", "4567")} == {""}


# --- connections


@pytest.fixture(scope="module")
def server(path):
    with served(path, "--ctx", N_CTX, "--api-key", "alice", "--api-key", "bob") as server:
        yield server


def begun(server: Served, *lines: str) -> socket.socket:
    """Return a connection with a begun request of Alice's."""
    host, port = server.root.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = [*lines, f"Host: {host}", "Authorization: Bearer alice", "", ""]
    connection.sendall("\r\n".join(head).encode())
    return connection


def test_slow_uploads_do_not_block_other_clients(server):
    length = ("POST /page/file?name=a.txt HTTP/1.1", "Content-Length: 5")
    slow = [begun(server, *length) for _ in range(12)]
    for connection in slow:
        connection.sendall(b"a")
    url = f"{server.root}/page/file?name=b.txt"
    answer = httpx2.post(url, content=b"words", headers=BOB, timeout=20)
    assert answer.json()["text"] == "words"
    refused = [begun(server, *length) for _ in range(12)]
    time.sleep(0.5)
    refused[-1].settimeout(10)
    assert b" 429 " in refused[-1].recv(100)
    for connection in (*slow, *refused):
        connection.sendall(b"rest")
    assert {b" 200 " in connection.recv(100) for connection in slow} == {True}
    for connection in (*slow, *refused):
        connection.close()


def test_client_cannot_choose_its_address(path):
    with served(path, "--ctx", N_CTX) as server:
        are_cached = []
        for address in ("10.0.0.8", "10.0.0.9"):
            body = {"prompt": LONG, "max_tokens": 1}
            headers = {"X-Forwarded-For": address}
            answer = httpx2.post(f"{server.api}/completions", json=body, headers=headers)
            are_cached.append(
                answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
            )
        assert are_cached == [False, True]
        assert "10.0.0" not in server.log


def test_ambiguous_length_closes_the_connection(server):
    lengths = ("Content-Length: 4", "Transfer-Encoding: chunked")
    with begun(server, "POST /tokenize HTTP/1.1", *lengths) as connection:
        connection.sendall(b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while piece := connection.recv(1000):
            received += piece
    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1 ") == 1  # the second request is not answered
