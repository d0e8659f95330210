"""The page without a browser: its files, headers, access and uploads."""

import asyncio
import hashlib
import importlib.metadata
import io
import re
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from pop_local.engine.images.pictures import MAX_BYTES as MAX_PICTURE_BYTES
from pop_local.engine.limited.process import KeptProcess
from pop_local.server.access import AccessRules
from pop_local.server.page import file_reader, page_routes
from pop_local.server.request_bodies import SamplingFields
from pop_local.texts.document_readers import MAX_BYTES as MAX_DOCUMENT_BYTES
from support.calls import opened
from support.paths import ROOT
from support.program import called
from support.server_requests import NAME
from support.serving import app_client, app_of

STATIC = ROOT / "pop_local" / "server" / "page" / "static"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def sent(client, content, name="a.txt", **headers):
    return client.post("/page/file", params={"name": name}, content=content, headers=headers)


def refusal(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def test_root_depends_on_accept_header(client):
    page = client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<!doctype html>" in page.text
    assert "Accept" in page.headers["vary"]
    assert client.get("/").text == "Ollama is running"
    assert client.head("/", headers=BROWSER).status_code == 200


@pytest.mark.parametrize("file", sorted(STATIC.rglob("*.*")), ids=lambda file: file.name)
def test_files_have_type_and_policy(client, file):
    part = client.get(f"/page/{file.relative_to(STATIC).as_posix()}")
    assert part.content == file.read_bytes()
    if file.suffix in (".js", ".mjs"):  # browsers run modules of this type only
        assert part.headers["content-type"].startswith("text/javascript")
    policy = part.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    assert part.headers["x-content-type-options"] == "nosniff"
    assert part.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name", ["", "none.js", "../page_routes.py", "%2e%2e/page_routes.py", "vendor"]
)
def test_unknown_files_return_404(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_page_and_reader_share_limits():
    limits = re.search(r"document: ([\d_]+), image: (\d+) \* 2 \*\* (\d+)", _part("composer.js"))
    assert limits is not None
    assert int(limits[1]) == MAX_DOCUMENT_BYTES
    assert int(limits[2]) * 2 ** int(limits[3]) == MAX_PICTURE_BYTES


def test_page_accepts_the_settings_that_the_server_accepts():
    for value, is_valid in ((0, True), (10, True), (10.1, False)):
        assert _accepts_temperature(value) == is_valid
    page = _part("index.html")
    assert 'id="temperature" type="number" min="0" max="10"' in page
    assert "isNumberIn(settings.temperature, 0, 10)" in _part("transfer.js")


def _accepts_temperature(value: float) -> bool:
    try:
        SamplingFields.model_validate({"temperature": value})
    except ValidationError:
        return False
    return True


def test_example_is_the_demo_document(client):
    document = ROOT / "pop_local" / "data" / "document.md"
    assert client.get("/page/example.md").content == document.read_bytes()


def _part(name: str) -> str:
    return (STATIC / name).read_text("utf-8")


def test_vendored_libraries_match_their_hashes():
    table = (STATIC / "vendor" / "LICENSES.md").read_text("utf-8")
    hashes = dict(re.findall(r"^\| `([\w.]+)` .* `([0-9a-f]{64})` \|$", table, re.M))
    files = [*(STATIC / "vendor").glob("*js")]
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert "marked" in notice and "DOMPurify" in notice


def test_wheel_contains_the_page():
    files = {str(path) for path in importlib.metadata.files("pop-local") or ()}
    parts = {path.relative_to(ROOT).as_posix() for path in STATIC.rglob("*.*")}
    assert parts <= files


def test_page_needs_no_key(path):
    client = app_client(app_of(opened(path), NAME, rules=AccessRules(api_keys=("secret",))))
    assert client.get("/", headers=BROWSER).status_code == 200
    assert client.get("/page/main.js").status_code == 200
    assert sent(client, b"text", Authorization="Bearer secret").json()["text"] == "text"


def test_uploaded_document_is_converted_to_text(client):
    assert sent(client, "Grüße\n".encode()).json() == {"name": "a.txt", "text": "Grüße\n"}
    mail = b"Subject: Lamps\nFrom: a@b.example\n\nLit at six.\n"
    assert "Lit at six." in sent(client, mail, "note.EML").json()["text"]
    name = "../../etc/passwd" + "x" * 300
    assert sent(client, b"text", name).json()["name"] == name[-200:]


def test_image_upload_returns_data_url(client):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    kind = {"Content-Type": "image/png"}
    url = sent(client, content.getvalue(), "a.png", **kind).json()["url"]
    assert url.startswith("data:image/png;base64,iVBOR")
    message = refusal(sent(client, b"<svg/>", "a.svg", **{"Content-Type": "image/svg+xml"}), 400)
    assert message.startswith("a.svg is not a readable image; use a PNG")


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "empty.txt", "empty.txt contains no text"),
        (b"\x80\x81", "a.bin", "a.bin is not UTF-8 text; convert the file to plain text first"),
        (b"%PDF-1.7 nothing", "a.pdf", "a.pdf cannot be read as PDF"),
        (b"PK", "a.docx", "a.docx cannot be read as DOCX"),
        (b"\x80", "", "the file is not UTF-8 text"),
    ],
)
def test_unreadable_file_returns_an_error(client, content, name, words):
    message = refusal(sent(client, content, name), 400)
    assert message.startswith(words)
    assert tempfile.gettempdir() not in message


def test_oversized_upload_is_refused_before_reading(client):
    read = []

    def body():
        read.append(1)
        yield b""

    headers = {"Content-Length": "500000000", "Expect": "100-continue"}
    words = refusal(sent(client, body(), "huge.pdf", **headers), 413)
    assert words == "huge.pdf is too large: the limit is 100,000,000 bytes"
    headers |= {"Content-Type": "image/png", "Content-Length": str(MAX_PICTURE_BYTES + 1)}
    assert "huge.png is too large" in refusal(sent(client, body(), "huge.png", **headers), 413)
    assert read == []


def test_upload_without_length_is_limited(client, monkeypatch, tmp_path):
    monkeypatch.setattr(page_routes, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pieces = (b"x" * 100 for _ in range(20))
    assert "limit is 1,000 bytes" in refusal(sent(client, pieces), 413)
    assert [*tmp_path.iterdir()] == []


def test_aborted_upload_leaves_no_file(client, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    events = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        if len(events) == 1:
            assert len([*tmp_path.rglob("sent*")]) == 1
        return events.pop(0)

    async def send(message):
        pass

    headers = [(b"host", b"localhost:8080")]
    scope: dict[str, object] = {
        "type": "http",
        "method": "POST",
        "path": "/page/file",
        "headers": headers,
    }
    scope |= {"query_string": b"name=a.txt", "http_version": "1.1"}
    asyncio.run(client.app(scope, receive, send))
    assert events == [] and [*tmp_path.iterdir()] == []


def test_slow_reader_is_killed(client, monkeypatch):
    slow = KeptProcess(file_reader.FileReader, limit_s=0.0, limit_bytes=2**30)
    monkeypatch.setattr(page_routes, "reader", slow)
    message = refusal(sent(client, b"text " * 1_000_000, "story"), 400)
    assert message.startswith("story needs too much time or memory (0 s")
    slow.close()


def test_document_length_is_limited(client):
    message = refusal(sent(client, b"x" * (file_reader.MAX_CHARACTERS + 1)), 400)
    assert message.startswith("a.txt is too long: 8,000,001 characters")


def test_web_option_opens_the_browser(path, monkeypatch):
    opened_at: list[str] = []
    served_at: list[str] = []

    def serve_instead(app, listening):
        served_at.append("http://127.0.0.1:{1}".format(*listening.getsockname()))
        assert app_client(app).get("/", headers=BROWSER).status_code == 200

    monkeypatch.setattr("webbrowser.open", opened_at.append)
    monkeypatch.setattr("pop_local.server.app.run_app", serve_instead)
    monkeypatch.setattr("pop_local.server.app.log_to_stderr", lambda _: None)
    assert called("chat", path, "--web").returncode == 0
    assert opened_at == served_at


@pytest.mark.parametrize("option", [("--temperature", "0"), ("--system", "x"), ("--seed", "1")])
def test_options_without_effect_on_page_are_refused(path, option):
    done = called("chat", path, "--web", *option)
    assert done.returncode == 2
    assert f"does not support {option[0]}" in " ".join(done.stderr.split())


def test_upload_names_never_read_server_files(client):
    assert Path("/etc/passwd").exists()
    assert sent(client, b"mine", "/etc/passwd").json()["text"] == "mine"
