"""Images over HTTP: OpenAI's image_url parts, Ollama's lists, and invalid images."""

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pop_local.engine.engine_options import EngineOptions
from pop_local.engine.images.pictures import Picture, picture_of
from pop_local.engine.model import PopModel
from pop_local.engine.prompt import prompter
from pop_local.server import request_images, task_factory
from support.serving import app_client, app_of, metric_values
from support.vision_models import encoded, make_vision_model, png

LONG = "a b c d e f g h " * 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("vision"), "qwen2vl")


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    model = PopModel(
        EngineOptions.of(path, mmproj=path.parent / "mmproj.gguf", n_ctx=1024, n_threads=1)
    )
    with app_client(app_of(model, "tiny")) as client:
        yield client
    model.close()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def post(client: TestClient, *parts: dict[str, Any]) -> Any:
    body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body)


def usage_of(client: TestClient, *parts: dict[str, Any]) -> dict[str, Any]:
    response = post(client, *parts)
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage


def test_usage_counts_images(client):
    usage = usage_of(client, image(data_url(png(3))), text(LONG))
    assert usage["pop"]["n_image"] > 0
    assert usage["pop"]["encode_s"] > 0
    figures = metric_values(client)
    assert figures["pop_image_tokens_total"] == usage["pop"]["n_image"]
    assert figures["pop_encode_seconds_total"] > 0
    cached = usage_of(client, image(data_url(png(3))), text(LONG))
    assert cached["pop"]["encode_s"] == 0
    assert client.get("/v1/models").json()["data"][0]["pop"]["images"] is True


def test_parts_keep_order(client):
    picture = image(data_url(png(3)))
    before = usage_of(client, text("a b c"), picture)
    assert usage_of(client, picture, text("a b c"))["prompt_tokens_details"]["cached_tokens"] < 10
    assert before["pop"]["n_image"] > 0


BOMB = encoded(Image.new("1", (12_000, 12_000)), "PNG")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1/a.png", "is not embedded"),
        ("file:///etc/passwd", "is not embedded"),
        ("/etc/passwd", "is not embedded"),
        ("data:text/plain;base64,aGVsbG8=", "is not embedded"),
        ("data:image/png,abc", "is not embedded"),
        ("data:image/png;base64,@@@@", "is not valid base64"),
        ("data:image/png;base64,abc", "is not valid base64"),
        ("data:image/png;base64,\u20ac", "is not valid base64"),
        (data_url(b""), "is not a readable image"),
        (data_url(b"RIFF\0\0\0\0WAVEfmt "), "is not a readable image"),
        (
            data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
            "is not a readable image",
        ),
        (data_url(png(3)[:3000]), "is not a readable image"),
        (data_url(encoded(Image.new("1", (4000, 2)), "PNG")), "is too long and narrow"),
        (data_url(BOMB), "more than 50 million pixels"),
    ],
    ids=lambda value: value[:32],
)
def test_invalid_images_are_refused(client, url, reason):
    response = post(client, image(url), text("a"))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert reason in error["message"]
    assert error["param"] == "messages"


def test_image_limits_per_request(client, monkeypatch):
    monkeypatch.setattr(request_images, "MAX_IMAGES", 2)
    picture = image(data_url(png(3, 32, 32)))
    assert post(client, picture, picture, picture, text("a")).status_code == 400
    monkeypatch.setattr(request_images, "MAX_REQUEST_PIXELS", 32 * 32 + 1)
    response = post(client, picture, picture, text("a"))
    assert "million pixels" in response.json()["error"]["message"]


def test_images_beyond_context_are_refused(path):
    vision = path.parent / "mmproj.gguf"
    options = EngineOptions.of(path, mmproj=vision, n_ctx=256, n_threads=1)
    pictures = [image(data_url(png(seed))) for seed in range(20)]
    with PopModel(options) as model, app_client(app_of(model, "tiny")) as client:
        response = post(client, *pictures, text("a"))
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_images_and_grammars_have_separate_limits(client, monkeypatch):
    is_begun, may_end = threading.Event(), threading.Event()

    def slow(urls: list[str]) -> list[Picture]:
        if urls:
            is_begun.set()
            assert may_end.wait(20)
            return [picture_of(png(3), "slow")]
        return []

    monkeypatch.setattr(task_factory, "parse_images", slow)
    waiting = threading.Thread(target=post, args=(client, image("data:"), text("a")))
    waiting.start()
    assert is_begun.wait(20)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    form = {"response_format": {"type": "json_object"}}
    try:
        assert client.post("/v1/chat/completions", json=body | form).status_code == 200
        assert waiting.is_alive()
    finally:
        may_end.set()
        waiting.join()


def test_image_allowance_covers_only_images(client):
    long = "@" * 2 * 2**20
    response = post(client, image("data:image/png;base64," + long), text("a"))
    assert response.status_code == 400 and "not valid base64" in response.text
    assert post(client, image("http://example.org/" + long), text("a")).status_code == 413
    assert post(client, text(long)).status_code == 413
    many = b'{"x": [' + b'"data:image", ' * 100_000 + b"0]}"
    assert client.post("/v1/chat/completions", content=many).status_code == 413


def test_oversized_image_request_returns_413(client, monkeypatch):
    response = post(client, image("data:image/png;base64," + "A" * (50 * 2**20)), text("a"))
    assert response.status_code == 413
    assert "images in a request are limited to a total of 32 MiB" in response.text
    half = b'{"url": "data:image/png;base64,AAAA'
    assert request_images.n_image_bytes(half) == len(half) - 8, (
        "a large image must be refused before its last byte arrives"
    )


def test_base64_may_contain_line_breaks(client):
    lines = base64.encodebytes(png(3)).decode()
    for ends in ("\n", "\r\n"):
        url = "data:image/png;base64," + lines.replace("\n", ends)
        assert usage_of(client, image(url), text("a"))["pop"]["n_image"] > 0


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "image_url"}, ".image_url"),
        ({"type": "image_url", "image_url": "https://example.org"}, ".image_url"),
        ({"type": "image_url", "image_url": {"url": 3}}, ".image_url.url"),
        ({"type": "text"}, ".text"),
        ({"type": "input_audio", "input_audio": {}}, ""),
        ({"text": "a"}, ""),
    ],
)
def test_malformed_parts_are_refused(client, part, field):
    response = post(client, part, text("a"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"messages.0.content.0{field}"


@pytest.mark.parametrize("lacks", ["mmproj", "Pillow"])
def test_server_without_vision_refuses_images(path, monkeypatch, lacks):
    vision = None if lacks == "mmproj" else path.parent / "mmproj.gguf"
    monkeypatch.setattr(prompter, "has_pillow", lambda: lacks != "Pillow")
    model = PopModel(EngineOptions.of(path, mmproj=vision, n_ctx=1024, n_threads=1))
    with app_client(app_of(model, "tiny")) as client:
        assert client.get("/v1/models").json()["data"][0]["pop"]["images"] is False
        response = post(client, image(data_url(png(3))), text("a"))
        assert response.status_code == 400
        assert "cannot read images" in response.json()["error"]["message"]
    model.close()


def letters(content: bytes) -> str:
    return base64.b64encode(content).decode()


def of_ollama(client: TestClient, *images: str, endpoint: str = "chat", words: str = "a") -> Any:
    fields = {"content": words} if endpoint == "chat" else {"prompt": words}
    message = {"role": "user", "images": images, **fields}
    body = {"messages": [message]} if endpoint == "chat" else message
    options = {"temperature": 0, "num_predict": 4}
    return client.post(f"/api/{endpoint}", json=body | {"options": options, "stream": False})


@pytest.mark.parametrize("endpoint", ["chat", "generate"])
def test_ollama_images_precede_text(client, endpoint):
    expected = usage_of(client, image(data_url(png(3))), text(LONG))
    answer = of_ollama(client, letters(png(3)), endpoint=endpoint, words=LONG).json()
    assert answer["prompt_eval_count"] == expected["prompt_tokens"]
    assert answer["pop"]["n_image"] == expected["pop"]["n_image"] > 0
    assert "vision" in client.post("/api/show", json={}).json()["capabilities"]


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("@@@@", "is not valid base64"),
        ("http://127.0.0.1/a.png", "is not valid base64"),
        ("/etc/passwd", "is not valid base64"),
        (letters(b"no picture"), "is not a readable image"),
        (letters(BOMB), "more than 50 million pixels"),
        ("@" * 2 * 2**20, "is not valid base64"),
    ],
    ids=lambda value: value[:32],
)
def test_invalid_ollama_images_are_refused(client, shown, reason):
    response = of_ollama(client, shown)
    assert response.status_code == 400, response.text
    assert reason in response.json()["error"]


def test_ollama_image_allowance_covers_only_images(client):
    assert of_ollama(client, letters(png(3)), words="@" * 2 * 2**20).status_code == 413
    assert of_ollama(client, "A" * (50 * 2**20)).status_code == 413
    assert of_ollama(client, *[letters(png(3, 32, 32))] * 65).status_code == 400
    structure = b'{"images": ["a\\" "' + b",[]" * 2**20 + b"]}"
    assert client.post("/api/chat", content=structure).status_code == 413
