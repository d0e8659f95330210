"""All routes of the application: access, methods, invalid bodies, and unknown models.

The tests read the routes from the application. A new POST route must accept the fields of
`body_for`:
add those that it requires.
"""

import json
import re
import threading
from pathlib import Path

import pytest
from starlette.routing import Route

from pop_local.server.access import AccessRules
from pop_local.server.app import create_app
from pop_local.server.model_pool import ModelPool
from support.library import NAMES, Library, library_client
from support.server_requests import BOMB, LONG, N_CTX, NAME, body_for, chat, error_of, text_of
from support.serving import LOCAL, app_client, app_of

APP = create_app(ModelPool(Library(Path()).registry()), LOCAL)
ROUTES: dict[str, set[str]] = {
    re.sub(r"{[^}]*}", "missing", route.path): route.methods
    for route in APP.routes
    if isinstance(route, Route) and route.methods
}
BODIES = [path for path in ROUTES if "POST" in ROUTES[path] and path != "/page/file"]
WITHOUT_TASK = ("/api/show", "/tokenize", "/detokenize")
KEYLESS = ("/", "/health", "/v1/health", "/page/missing")


SCHEMA = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}}}
DEEP = {"type": "string", "pattern": "(a?){1000}" * 20 + "(?=a)"}


def test_application_has_routes_of_every_api():
    versioned = {path.removeprefix("/v1") for path in ROUTES if path.startswith("/v1/")}
    assert versioned <= ROUTES.keys()
    assert len(BODIES) > 20 and len({path.split("/")[1] for path in ROUTES}) > 15


@pytest.mark.parametrize("route", ROUTES)
def test_route_requires_the_key(full, route):
    client = app_client(app_of(full, NAME, rules=AccessRules(api_keys=("secret",))))
    method = "GET" if "GET" in ROUTES[route] else "POST"
    refused = client.request(method, route)
    assert (refused.status_code == 401) is (route not in KEYLESS)
    if route not in KEYLESS:
        assert "API key" in error_of(refused)
        key = {"Authorization": "Bearer secret"}
        assert client.request(method, route, headers=key).status_code != 401


@pytest.mark.parametrize("route", ROUTES)
def test_other_methods_are_refused(client, route):
    other = "GET" if route in BODIES else "POST"
    for method in {other, "PUT", "DELETE"} - ROUTES[route]:
        refused = client.request(method, route)
        assert refused.status_code == 405
        assert error_of(refused) == "Method Not Allowed"


@pytest.mark.parametrize("route", BODIES)
def test_malformed_bodies_are_refused(client, route):
    bodies = [
        (b"", 400),
        (b"{", 400),
        (b"[1, 2]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 50_000, 400),
        (b'{"a":' * 15_000, 400),
        (b'{"x": "' + b"y" * 200_000 + b'"}', 413),
        (b'{"images": [' + b'"",' * 60_000 + b'""]}', 413),
        (b'{"images": ["a\\" "' + b",[]" * 60_000 + b"]}", 413),
    ]
    for content, status in bodies:
        for sent in (content, iter([content[:1], content[1:]])):
            response = client.post(route, content=sent)
            assert response.status_code == status, response.text
            assert error_of(response)
        assert status != 413 or "100,000 bytes" in error_of(response)
    assert text_of(chat(client, "hello", max_tokens=1)) is not None


@pytest.mark.parametrize("route", BODIES)
def test_strict_server_refuses_unknown_models(full, route):
    client = app_client(app_of(full, NAME, strict_model=True))
    response = client.post(route, json=body_for(route) | {"model": "gpt-4o"})
    assert response.status_code == 404
    assert error_of(response) == f"no model named 'gpt-4o' exists; this server serves {NAME!r}"


def test_each_route_opens_the_named_model(library):
    """The models have no tokens for infilling."""
    with library_client(library) as client:
        for number, route in enumerate(BODIES):
            name = NAMES[number % 3]
            response = client.post(route, json=body_for(route) | {"model": name})
            if route == "/infill":
                assert "no fill-in-the-middle" in error_of(response)
                continue
            assert response.status_code == 200, response.text
            assert response.json().get("model", name) == name
            assert route == "/api/show" or library.open_ones == [name]


@pytest.mark.parametrize("route", [route for route in BODIES if route not in WITHOUT_TASK])
def test_prompt_beyond_context_is_refused(client, filler, route):
    response = (filler[1] if route == "/infill" else client).post(
        route, json=body_for(route, "x" * 5000)
    )
    assert response.status_code == 400
    assert f"are limited to {N_CTX}" in error_of(response)


@pytest.mark.parametrize("route", [route for route in BODIES if f"/v1{route}" in BODIES])
def test_routes_work_without_version(client, route):
    short, long = (
        client.post(version + route, json=body_for(route, LONG)) for version in ("", "/v1")
    )
    assert short.status_code == long.status_code == 200
    assert (short.json().keys() == long.json().keys()) is (route != "/completions")


@pytest.mark.parametrize(
    ("route", "field"),
    [
        ("/completion", {"grammar": f'root ::= a0 "z"\n{BOMB[:-2]}"a"'}),
        ("/completion", {"json_schema": SCHEMA}),
        ("/completion", {"json_schema": DEEP}),
        ("/api/chat", {"format": SCHEMA}),
        ("/api/chat", {"format": DEEP}),
        ("/api/generate", {"format": SCHEMA}),
        ("/api/generate", {"format": SCHEMA, "raw": True}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
        ("/v1/messages", {"tools": [{"name": "a", "input_schema": DEEP}]}),
    ],
)
def test_schema_that_exhausts_memory_is_refused(client, route, field):
    response = client.post(route, json=body_for(route) | field)
    assert response.status_code == 400, response.text
    assert error_of(response)
    assert text_of(chat(client, "hello", max_tokens=1)) is not None


def test_unknown_path_suggests_the_nearest(client):
    unknown = client.post("/v1/chat/completion", json={})
    assert unknown.status_code == 404
    assert "did you mean /v1/chat/completions?" in error_of(unknown)
    assert "unknown path '/api/pull'" in error_of(client.post("/api/pull", json={}))
    assert "docs/server.md" in error_of(client.get("/zzz"))
    assert len(error_of(client.get("/" + "x" * 5000))) < 400


def test_tokenization_blocks_no_other_request(client):
    text = json.dumps({"content": "\U00012345" * 5_000})
    statuses: list[int] = []

    def tokenize() -> None:
        statuses.append(client.post("/tokenize", content=text).status_code)

    threads = [threading.Thread(target=tokenize) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert client.get("/health").status_code == 200
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 4
