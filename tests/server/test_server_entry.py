"""Access by key, host name and origin. No test needs a worker, so none is started."""

import json
import re

import pytest

from pop_local.server.access import AccessRules
from support.calls import opened
from support.converted import tiny
from support.program import called
from support.serving import app_client, app_of, metric_values

NAME = "tiny"
ORIGINS = ("https://friend.example", "app://notes")
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = opened(tiny(tmp_path_factory.mktemp("entry")))
    yield model
    model.close()


def test_api_key_is_required(model):
    client = app_client(app_of(model, NAME, rules=AccessRules(api_keys=("secret",))))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        refused = client.get("/v1/models", headers=header)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").status_code == 200
    right = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "headers", "code"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1:8080"}, None),
        ("127.0.0.1", {"Host": "LOCALHOST"}, None),
        ("::1", {"Host": "[::1]:8080"}, None),
        ("127.0.0.1", {"Host": "evil.example:8080"}, "foreign_host"),
        ("127.0.0.1", {"Host": "localhost.evil.example"}, "foreign_host"),
        ("127.0.0.1", {"Host": "192.168.1.5"}, "foreign_host"),
        ("127.0.0.1", {"Host": "[::1"}, "foreign_host"),
        ("127.0.0.1", {"Host": ""}, "foreign_host"),
        ("127.0.0.1", {"Host": "user:pw@127.0.0.1"}, "foreign_host"),
        ("127.0.0.1", {"Host": "127.0.0.1/evil.example"}, "foreign_host"),
        ("127.0.0.1", {"Host": "127.0.0.1?.evil.example"}, "foreign_host"),
        ("MyBox", {"Host": "mybox:8080"}, None),
        ("mybox", {"Host": "otherbox:8080"}, "foreign_host"),
        ("0.0.0.0", {"Host": "192.168.1.5:8080"}, None),
        ("::", {"Host": "[fe80::1]:8080"}, None),
        ("0.0.0.0", {"Host": "evil.example"}, "foreign_host"),
        ("0.0.0.0", {"Host": "host.docker.internal:8080"}, None),
        ("mybox", {"Host": "HOST.docker.internal"}, None),
        ("127.0.0.1", {"Host": "host.docker.internal"}, "foreign_host"),
        ("localhost", {"Host": "host.docker.internal"}, "foreign_host"),
        ("0.0.0.0", {"Host": "host.docker.internal.evil.example"}, "foreign_host"),
        ("127.0.0.1", {"Host": "evil.example", "Origin": "http://localhost"}, "foreign_host"),
        ("127.0.0.1", {"Host": "evil.example", "Origin": "app://notes"}, "foreign_host"),
        ("127.0.0.1", {"Origin": "http://localhost:3000"}, None),
        ("127.0.0.1", {"Origin": "https://friend.example"}, None),
        ("127.0.0.1", {"Origin": "app://notes"}, None),
        ("127.0.0.1", {"Origin": "http://friend.example"}, "foreign_origin"),
        ("127.0.0.1", {"Origin": "https://friend.example:81"}, "foreign_origin"),
        ("0.0.0.0", {"Host": "192.168.1.5:8080", "Origin": "http://192.168.1.5:8080"}, None),
        ("127.0.0.1", {"Origin": "https://evil.example"}, "foreign_origin"),
        ("127.0.0.1", {"Origin": "https://localhost.evil.example"}, "foreign_origin"),
        ("0.0.0.0", {"Host": "192.168.1.5", "Origin": "http://6.6.6.6"}, "foreign_origin"),
        ("127.0.0.1", {"Origin": "null"}, "foreign_origin"),
        ("127.0.0.1", {"Origin": "https://evil.example@localhost"}, "foreign_origin"),
        ("127.0.0.1", {"Origin": "http://[::1"}, "foreign_origin"),
    ],
)
def test_keyless_server_accepts_only_local_hosts(model, host, headers, code):
    client = app_client(app_of(model, NAME, rules=AccessRules(host=host, origins=ORIGINS)))
    response = client.get("/v1/models", headers=headers)
    if code is None:
        assert response.status_code == 200
        return
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert "--api-key" in error["message"]
    assert ("--cors" in error["message"]) == (code == "foreign_origin")


def test_simple_cors_request_is_refused(model):
    client = app_client(app_of(model, NAME))
    before = metric_values(client)
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    body = json.dumps({"prompt": 5})  # an accepted request would get a 400
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 403
    after = metric_values(client)
    refused = 'pop_requests_total{path="/v1/completions",status="403"}'
    assert after[refused] == before.get(refused, 0) + 1


def test_any_origin_with_key_is_accepted(model):
    client = app_client(app_of(model, NAME, rules=AccessRules(api_keys=("secret",))))
    page = {"Host": "box.example", "Origin": "https://page.example"}
    allowed = client.options("/v1/chat/completions", headers=page | PREFLIGHT)
    assert allowed.status_code == 200
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    answer = client.get("/v1/models", headers=page | {"Authorization": "Bearer secret"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert client.get("/v1/models", headers=page).status_code == 401


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("tauri://localhost", True),
        ("http://localhost:3000", True),
        ("https://localhost", True),
        ("http://127.0.0.1:5173", True),
        ("http://[::1]:1", True),
        ("https://friend.example", True),
        ("app://notes", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost:3000.evil.example", False),
        ("http://localhost:x@evil.example", False),
        ("http://xlocalhost", False),
        ("http://127.0.0.1.evil.example", False),
        ("http://127x0x0x1", False),
        ("ftp://localhost", False),
        ("null", False),
    ],
)
def test_local_origins_are_allowed_without_key(model, origin, is_allowed):
    client = app_client(app_of(model, NAME, rules=AccessRules(origins=ORIGINS)))
    page = {"Origin": origin}
    allowed = client.options("/api/chat", headers=page | PREFLIGHT)
    assert allowed.status_code == (200 if is_allowed else 400)
    for response in (allowed, client.get("/v1/models", headers=page)):
        expected = origin if is_allowed else None
        assert response.headers.get("access-control-allow-origin") == expected
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origin", ["friend.example", "*", "null", "https://a.example/path", ""])
def test_cors_option_rejects_invalid_origins(origin):
    done = called("serve", "model.gguf", "--cors", origin)
    assert done.returncode == 1
    assert "is not a valid web origin" in done.stderr


def test_command_passes_origins_and_strictness(model, monkeypatch):
    statuses: list[int] = []

    def ask_instead(app, listening):
        client = app_client(app)
        for origin in ("https://friend.example", "https://evil.example"):
            statuses.append(client.get("/v1/models", headers={"Origin": origin}).status_code)
        statuses.append(client.post("/api/show", json={"model": "other"}).status_code)

    monkeypatch.setattr("pop_local.server.app.run_app", ask_instead)
    monkeypatch.setattr("pop_local.server.app.log_to_stderr", lambda _: None)
    options = ("--port", 0, "--cors", "https://FRIEND.example/", "--strict-model")
    assert called("serve", model.engine.context.files.path, *options).returncode == 0
    assert statuses == [200, 403, 404]


def test_command_announces_fast_reading_and_clickable_addresses(model, monkeypatch):
    monkeypatch.setattr("pop_local.server.app.run_app", lambda app, listening: None)
    monkeypatch.setattr("pop_local.server.app.log_to_stderr", lambda _: None)
    path, notices = model.engine.context.files.path, []
    for options in ((), ("--full",)):
        done = called("serve", path, "--port", 0, "--threads", 1, *options)
        notices.append(" ".join(done.stderr.split()))
    assert "uses fast reading (it skips 4 of 8 layers)." in notices[0]
    assert "reads prompts in full." in notices[1]
    assert re.search(r"Serving a web page at (http://[\d.:]+)/ and APIs at \1/v1 \(", notices[0])
