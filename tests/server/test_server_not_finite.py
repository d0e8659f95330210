"""A model whose output is NaN ends each answer with one error, whichever API is used."""

import json
from typing import Any

import numpy as np
import pytest

from pop_base.errors import PopError
from pop_converter.gguf.header import read_header
from support.calls import opened
from support.filling import make_filler
from support.server_requests import N_CTX, NAME, body_for
from support.serving import app_client, app_of
from support.synthetic import TEMPLATE, make_gguf

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
FUNCTION = {"name": "double", "parameters": PARAMETERS}
TOOL = {"name": "double", "input_schema": PARAMETERS}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    *((route, {}) for route in (CHAT, "/v1/responses", "/v1/messages", "/v1/embeddings")),
    *((route, {}) for route in ("/api/chat", "/api/generate", "/api/embed")),
    (CHAT, {"temperature": 1.0}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"tools": [{"type": "function", "function": FUNCTION}]}),
    ("/v1/completions", {"logprobs": 2}),
    ("/v1/responses", {"tools": [{"type": "function", **FUNCTION}]}),
    ("/v1/messages", {"tools": [TOOL]}),
    ("/api/chat", {"format": {"type": "integer"}}),
    ("/completion", {"n_probs": 2}),
]


def broken_model(path, name: str, value: float):
    """Write a model with one tensor value replaced by NaN or infinity."""
    return damage(make_gguf(path, "llama", chat_template=TEMPLATE), name, value)


def damage(path, name: str, value: float):
    header = read_header(path)
    [tensor] = (candidate for candidate in header.tensors if candidate.name == name)
    raw = bytearray(path.read_bytes())
    at = header.data_start + tensor.offset
    raw[at : at + 4] = np.float32(value).tobytes()
    path.write_bytes(raw)
    return path


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=["nan", "infinity"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "broken.gguf"
    with opened(broken_model(path, "output_norm.weight", request.param), n_ctx=N_CTX) as model:
        yield model


@pytest.fixture(scope="module")
def client(model):
    with app_client(app_of(model, NAME)) as client:
        yield client


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("route", "fields"), REQUESTS)
def test_every_api_reports_one_error(client, route, fields, streams):
    streams = streams and "embed" not in route
    body = body_for(route, "one two") | {"stream": streams}
    response = client.post(route, json=body | fields)
    assert response.text.count("is NaN or infinite") == 1
    assert "unexpected" not in response.text and "NaN," not in response.text
    assert streams or response.status_code == 500
    for line in response.text.splitlines():
        payload = line.removeprefix("data:").strip()
        if payload.startswith("{"):
            json.loads(payload, parse_constant=pytest.fail)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_infill_reports_one_error(tmp_path, streams):
    path = damage(make_filler(tmp_path), "output_norm.weight", np.nan)
    body = {"input_prefix": "a", "input_suffix": "b", "n_predict": 4, "stream": streams}
    with opened(path, n_ctx=N_CTX) as model, app_client(app_of(model, NAME)) as client:
        assert client.post("/infill", json=body).text.count("is NaN or infinite") == 1


def test_python_reports_one_error(model):
    for temperature in (0.0, 1.0):
        with pytest.raises(PopError, match="is NaN or infinite"):
            model.chat("one two", temperature=temperature)
