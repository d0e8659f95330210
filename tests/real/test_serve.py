"""Test `pop-local serve` in a child process: common clients, disconnects, shutdown."""

import json
import os
import signal
import socket
import subprocess
import sys

import httpx2
import openai
import pytest

from pop_base.errors import PopError
from pop_local.server.app import bind
from support.calls import wait_for
from support.converted import tiny
from support.serving import served

STORY = (
    "The ferry to the island leaves the stone pier at half past six. Old Mara sells coffee there, "
    "and her dog sleeps under the table. Nobody has ever seen it awake. "
)
QUESTION = {"role": "user", "content": STORY + "Who sells coffee at the pier?"}
PRUNED = 'pop_prompt_tokens_total{kind="pruned"}'
# The answer fills the context.
ENDLESS = "root ::= [a-z] root"
DECODED = "pop_decoded_tokens_total"
DISCONNECTED = 'pop_requests_total{path="/v1/chat/completions",status="499"}'


# Rows refilled between two requests would change the second answer.
REPEATABLE = ("--ctx", 2048, "--refill", "off", "--parallel", 1)


@pytest.fixture(scope="module")
def server(smollm2_pop):
    with served(smollm2_pop, *REPEATABLE, "--name", "smol", "--api-key", "secret") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def free(smollm2_pop):
    """Run a server without a key, for plain HTTP clients."""
    with served(smollm2_pop, *REPEATABLE) as server:
        yield server


def ask(client, **options):
    fixed = {"model": "smol", "messages": [QUESTION], "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(**fixed | options)


# --- OpenAI's client


def test_catalog_model_keeps_the_requested_name(smollm2, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_MODELS_DIR", str(smollm2.parent))
    with served("SmolLM2") as server:
        [card] = httpx2.get(f"{server.api}/models").json()["data"]
    assert card["id"] == "SmolLM2"


def test_openai_client_chats(client):
    assert [model.id for model in client.models.list()] == ["smol"]
    whole = ask(client)
    assert whole.usage.pop["n_pruned"] > 20
    stream = ask(client, stream=True, stream_options={"include_usage": True})
    *pieces, figures = list(stream)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert figures.usage.completion_tokens == 12
    assert figures.usage.prompt_tokens_details.cached_tokens > 50
    again = [ask(client, temperature=1.2, seed=4).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]


def test_openai_client_completes(client):
    fixed = {"model": "smol", "temperature": 0, "max_tokens": 12}
    request = fixed | {"prompt": "A, B, C, D, E,", "stop": " H"}
    (choice,) = client.completions.create(logprobs=2, **request).choices
    assert (choice.text, choice.finish_reason) == (" F, G,", "stop")
    assert choice.logprobs.tokens == [" F", ",", " G", ","]
    pieces = client.completions.create(stream=True, **request)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_openai_client_receives_logprobs_and_schemas(client):
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(token.top_logprobs[0].token == token.token for token in content)
    schema = {
        "type": "object",
        "properties": {
            "seller": {"type": "string", "maxLength": 12},
            "asleep": {"type": "boolean"},
        },
        "required": ["seller", "asleep"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, response_format=form, max_tokens=60).choices[0].message.content
    assert sorted(json.loads(answer)) == ["asleep", "seller"]


def test_openai_client_raises_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="the prompt has 40"):
        ask(client, messages=[{"role": "user", "content": "word " * 4000}])
    with pytest.raises(openai.NotFoundError, match="this server serves 'smol'"):
        client.models.retrieve("gpt-4o")
    assert ask(client, model="gpt-4o").model == "smol"
    wrong = openai.OpenAI(base_url=server.api, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        ask(wrong)
    with pytest.raises(openai.APIError, match="no token"):
        list(ask(client, stream=True, extra_body={"grammar": 'root ::= "a" x\nx ::= x "c"'}))


# --- The llm program


def test_llm_program_answers(server, client, tmp_path):
    config = f"""
- model_id: pop
  model_name: smol
  api_base: {server.api}
  api_key_name: pop
"""
    (tmp_path / "extra-openai-models.yaml").write_text(config)
    (tmp_path / "keys.json").write_text('{"pop": "secret"}')
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "pop", *options, QUESTION["content"]],
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip("\n") == ask(client).choices[0].message.content


# --- Several clients, and clients that disconnect


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_stops_the_prefill(free, stream):
    before = free.metrics()
    request = {"role": "user", "content": f"{stream}. " + STORY * 45}
    impatient = httpx2.Timeout(60, read=0.2)
    with pytest.raises(httpx2.ReadTimeout):
        # A stream's first event is immediate; the next one follows the prefill.
        free.post("chat/completions", timeout=impatient, messages=[request], stream=stream)
    answer = free.post("chat/completions", messages=[QUESTION], max_tokens=2).json()
    after = free.metrics()
    assert answer["usage"]["completion_tokens"] == 2
    assert after[DISCONNECTED] == before.get(DISCONNECTED, 0) + 1
    n_own = answer["usage"]["pop"]["n_pruned"]
    assert after[PRUNED] - before[PRUNED] - n_own < 1000, "of about 1,700"
    assert after[DECODED] - before[DECODED] == 2


def test_disconnect_stops_the_answer(free):
    before = free.metrics()
    body = {"messages": [QUESTION], "stream": True, "grammar": ENDLESS}
    with httpx2.stream("POST", f"{free.api}/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert sum(1 for _, line in zip(range(12), lines, strict=False) if line) == 6
    assert free.post("chat/completions", messages=[QUESTION], max_tokens=2).status_code == 200
    after = free.metrics()
    assert after[DISCONNECTED] == before.get(DISCONNECTED, 0) + 1
    assert after[DECODED] - before[DECODED] < 500


def test_client_that_disconnects_in_the_queue_is_not_served(free):
    before = free.metrics()
    slow = {"messages": [QUESTION], "grammar": ENDLESS, "stream": True}
    with httpx2.stream("POST", f"{free.api}/chat/completions", json=slow, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)
        with pytest.raises(httpx2.ReadTimeout):
            free.post(
                "chat/completions", httpx2.Timeout(60, read=0.2), messages=[QUESTION], max_tokens=2
            )
        wait_for(lambda: free.metrics().get(DISCONNECTED, 0) > before.get(DISCONNECTED, 0))
        assert free.metrics()["pop_queue_length"] == 0
        assert next(lines, None) is not None  # the first answer continues
    assert free.post("chat/completions", messages=[QUESTION], max_tokens=2).status_code == 200
    after = free.metrics()
    assert after["pop_queue_seconds_count"] - before["pop_queue_seconds_count"] == 2
    assert after[DISCONNECTED] == before.get(DISCONNECTED, 0) + 2


# --- Startup and shutdown


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_server_during_an_answer(tiny_file, number, code):
    with served(tiny_file, "--ctx", 4096) as server:
        body = {"prompt": "a", "stream": True, "max_tokens": 4000, "grammar": ENDLESS}
        url = f"{server.api}/completions"
        with httpx2.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(number)
            rest = "".join(lines)
        assert server.process.wait(timeout=30) == code
        assert "the server is stopping" in rest
        assert "Traceback" not in server.log
        assert server.log.count("POST '/v1/completions' 200") == 1


def test_used_port_is_one_clear_error(tiny_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "pop_local", "serve", str(tiny_file), "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert "--port 0" in hint


@pytest.mark.parametrize(
    ("host", "reason"),
    [("192.0.2.1", r"cannot listen on 192\.0\.2\.1"), ("a..b", r"a\.\.b is not an address")],
)
def test_address_of_another_machine_is_refused(host, reason):
    with pytest.raises(PopError, match=reason) as caught:
        bind(host, 0)
    assert "an address of this machine" in caught.value.hint


def test_missing_packages_are_reported_with_the_extra(tiny_file):
    code = "import sys; sys.modules['uvicorn'] = None; from pop_local.__main__ import main; main()"
    command = [sys.executable, "-c", code, "serve", tiny_file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "serving needs uvicorn" in done.stderr
    assert "'pop-local[server]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "is_kept"), [((), True), (("--cache-ram", 0, "--parallel", 1), False)]
)
def test_prompt_cache_and_open_address_follow_the_options(tiny_file, arguments, is_kept):
    key = () if is_kept else ("--api-key", "secret")
    with served(tiny_file, "--host", "0.0.0.0", *arguments, *key) as server:
        assert ("pass --api-key" in server.log) == (not key)
        headers = {"Authorization": "Bearer secret"}
        # DNS rebinding: a foreign page has another Host and no key.
        for host, status in (("192.168.1.5", 200), ("evil.example", 200 if key else 403)):
            named = {**headers, "Host": host}
            assert httpx2.get(f"{server.api}/models", headers=named).status_code == status
        for text in ("a" * 300, "b" * 300, "a" * 300):
            body = {"prompt": text, "max_tokens": 1}
            answer = httpx2.post(f"{server.api}/completions", json=body, headers=headers)
            usage = answer.json()["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 250) == is_kept
