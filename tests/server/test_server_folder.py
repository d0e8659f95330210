"""A folder of models: damaged files, names, listings, the command."""

import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from pop_base.errors import PopError
from pop_local.server.app import create_app
from pop_local.server.model_pool import ModelPool
from support.calls import opened, wait_for
from support.converted import converted
from support.library import NAMES, Library, library_client
from support.program import called
from support.server_requests import LONG, N_CTX, chat, complete, text_of
from support.serving import LOCAL, app_client, app_of, served


def test_damaged_file_leaves_other_models_open(folder, tmp_path, expected):
    shutil.copy(folder / "one.gguf", tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    library = Library(tmp_path)
    with library_client(library) as client:
        assert text_of(complete(client, model="one")) == expected["one"]
        for _ in range(2):
            response = complete(client, model="broken")
            assert response.status_code == 500
            assert "cannot open broken" in response.json()["error"]["message"]
        assert library.open_ones == ["one"]
        assert text_of(complete(client, model="one")) == expected["one"]
        assert len(library.models) == 1


def test_damaged_file_is_never_the_default(folder, tmp_path, expected):
    shutil.copy(folder / "one.gguf", tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    pool = ModelPool.of_folder(tmp_path, Library(tmp_path).registry(), "")
    with app_client(create_app(pool, LOCAL)) as client:
        for more in ({}, {"model": "gpt-4o"}):
            assert text_of(complete(client, **more)) == expected["one"]
    pool.close()


def test_loading_error_reaches_every_waiting_request(library, expected, caplog):
    with library_client(library) as client, ThreadPoolExecutor(3) as others:
        assert text_of(complete(client, model="one")) == expected["one"]
        library.problem = PopError("the memory is full", "take a smaller context")
        library.may_open.clear()
        waiting = [others.submit(chat, client, model="two") for _ in range(3)]
        wait_for(lambda: library.behind.n_waiting() == 3)
        library.may_open.set()
        for request in waiting:
            response = request.result()
            assert response.status_code == 500
            message = "cannot open two: the memory is full; take a smaller context"
            assert response.json()["error"]["message"] == message
        assert message in caplog.text
        assert library.n_tried == 2
        library.problem = ValueError("on purpose")
        assert "unexpected ValueError" in complete(client, model="two").text
        library.problem = None
        assert text_of(complete(client, model="one")) == expected["one"]
        assert text_of(complete(client, model="two")) == expected["two"]


def test_unknown_names_select_the_default_model(library, expected):
    with library_client(library) as client:
        answer = complete(client)
        assert answer.json()["model"] == "one"  # initially the first
        assert text_of(complete(client, model="two")) == expected["two"]
        assert complete(client).json()["model"] == "two"  # the last requested
        answer = complete(client, model="gpt-4o")
        assert (answer.json()["model"], answer.headers["x-model"]) == ("two", "two")
        assert client.get("/v1/models/gpt-4o").status_code == 404
    with library_client(library, default="three", strict_model=True) as client:
        assert text_of(complete(client)) == expected["three"]
        refused = complete(client, model="gpt-4o")
        assert refused.status_code == 404
        assert "'one', 'three', 'two'" in refused.json()["error"]["message"]
        assert library.open_ones == ["three"]


def test_catalog_names_find_files(folder, tmp_path, expected):
    shutil.copy(folder / "one.gguf", tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    shutil.copy(folder / "two.gguf", tmp_path)
    with library_client(Library(tmp_path)) as client:
        assert text_of(complete(client, model="two")) == expected["two"]
        assert text_of(complete(client, model="smollm2")) == expected["one"]


def test_folder_may_be_empty(folder, tmp_path, expected):
    with library_client(Library(tmp_path)) as client:
        assert client.get("/v1/models").json()["data"] == []
        assert complete(client, model="one").status_code == 404
        assert complete(client).status_code == 404
        shutil.copy(folder / "one.gguf", tmp_path)
        assert text_of(complete(client)) == expected["one"]


# --- listings


def test_listings_open_no_model(folder, tmp_path, caplog):
    for name in NAMES:
        shutil.copy(folder / f"{name}.gguf", tmp_path)
    converted(tmp_path / "one.gguf", tmp_path, boundary=4)
    for name in ("broken", "mmproj-one", "gone.pop-sidecar", "part-00002-of-00002"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + bytes(100))
    library = Library(tmp_path)
    names = ["one", "one.pop", "three", "two"]
    if sys.platform == "linux":
        shutil.copy(folder / "two.gguf", Path(os.fsdecode(bytes(tmp_path) + b"/z\xff.gguf")))
        names += ["z\\xff"]
    caplog.set_level(logging.WARNING, "pop_local.server")
    with library_client(library) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == names
        assert not any(card["pop"]["loaded"] for card in cards)
        assert [card["pop"]["boundary"] for card in cards[:4]] == [0, 4, 0, 0]
        assert "skipping broken" in caplog.text
        tags = client.get("/api/tags").json()["models"]
        assert [tag["name"] for tag in tags] == [f"{name}:latest" for name in names]
        assert len({tag["digest"] for tag in tags}) == 4  # two files are equal
        assert client.get("/api/ps").json() == {"models": []}
        assert client.get("/v1/models/two").json() == cards[3]
        description = client.post("/api/show", json={"model": "two"}).json()
        assert description["model_info"]["llama.context_length"] == N_CTX
        assert description["capabilities"] == ["completion", "tools"]
        assert client.get("/v1/models/broken").status_code == 500
        assert library.models == []
        complete(client, model="one.pop", max_tokens=1)
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards if card["pop"]["loaded"]] == ["one.pop"]
        (running,) = client.get("/api/ps").json()["models"]
        assert (running["name"], running["context_length"]) == ("one.pop:latest", N_CTX)
        (tmp_path / "three.gguf").unlink()
        assert len(client.get("/v1/models").json()["data"]) == len(names) - 1
        (tmp_path / "one.pop.gguf").write_bytes(b"GGUF" + bytes(100))  # damaged while open
        assert client.get("/api/ps").json() == {"models": []}
        (tmp_path / "one.pop.gguf").unlink()
        for path in ("/v1/models", "/api/tags", "/api/ps"):
            assert client.get(path).status_code == 200


# --- the command


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("x.gguf --ram 2", "requires --models"),
        ("--models {folder} --name x", "conflicts with --models"),
        ("--models {folder} --sidecar x", "conflicts with --models"),
        ("--models {folder} --mmproj x", "conflicts with --models"),
        ("--models {folder}/nowhere", "does not exist"),
        ("--models {folder} --ram inf", "finite"),
    ],
)
def test_conflicting_options_are_refused(folder, words, reason):
    done = called("serve", *words.format(folder=folder).split())
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.replace("│", "").split())


def test_command_serves_a_folder(folder, expected, monkeypatch):
    texts: list[str] = []

    def ask_instead(app, listening):
        texts.append(",".join(served.name for served in app.state.models.loaded))
        with app_client(app) as client:
            texts.append(text_of(complete(client)))
            texts.append(text_of(complete(client, model="two")))

    monkeypatch.setattr("pop_local.server.app.run_app", ask_instead)
    monkeypatch.setattr("pop_local.server.app.log_to_stderr", lambda _: None)
    options = ("--models", folder, "--port", 0, "--threads", 1, "--ctx", 1024)
    done = called("serve", *options)
    assert done.returncode == 0, done.stderr
    notice = " ".join(done.stderr.split())
    assert (
        "one, three, two. The server loads models on demand and keeps one model loaded." in notice
    )
    assert called("serve", "three.gguf", *options, "--ram", 4).returncode == 0
    one, two, three = expected["one"], expected["two"], expected["three"]
    assert texts == ["", one, two, "three", three, two]
    wrong = called("serve", "thre", *options)
    assert wrong.returncode == 1
    assert "did you mean three?" in wrong.stderr


# --- replaced files


def replaced(path: Path, source: Path) -> None:
    shutil.copy(source, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("ram_bytes", [0, 1 << 40])
def test_replaced_file_is_reopened(folder, tmp_path, expected, ram_bytes):
    for name in ("one", "three"):
        shutil.copy(folder / f"{name}.gguf", tmp_path)
    with library_client(Library(tmp_path), ram_bytes=ram_bytes) as client:
        assert text_of(complete(client, model="three")) == expected["three"]
        assert text_of(complete(client, model="one")) == expected["one"]
        replaced(tmp_path / "one.gguf", folder / "two.gguf")
        assert client.get("/health").json() == {"status": "ok", "replaced": ["one"]}
        for _ in range(2):
            assert text_of(complete(client, model="one")) == expected["two"]
        assert client.get("/health").json() == {"status": "ok"}
        assert text_of(complete(client, model="three")) == expected["three"]


def test_file_replaced_during_an_answer_is_reopened(folder, tmp_path, expected):
    shutil.copy(folder / "one.gguf", tmp_path)
    body = {"model": "one", "prompt": LONG, "temperature": 0, "max_tokens": 200, "stream": True}
    with library_client(Library(tmp_path)) as client, ThreadPoolExecutor(1) as other:
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            replaced(tmp_path / "one.gguf", folder / "two.gguf")
            answer = other.submit(complete, client, model="one")
            last = json.loads([line[6:] for line in lines if line.startswith("data: {")][-1])
        # The pages of a replaced file may have changed, so the old answer ends.
        assert "was changed after it was opened" in last["error"]["message"]
        assert text_of(answer.result()) == expected["two"]


@pytest.mark.parametrize("is_damaged", [True, False])
def test_health_reports_single_model_that_cannot_be_reopened(
    folder, tmp_path, expected, is_damaged
):
    shutil.copy(folder / "one.gguf", tmp_path)
    library = Library(tmp_path)
    with library_client(library) as client:
        assert text_of(complete(client)) == expected["one"]
        (tmp_path / "damaged").write_bytes(b"GGUF" + bytes(100))
        replaced(tmp_path / "one.gguf", tmp_path / "damaged" if is_damaged else folder / "two.gguf")
        library.problem = PopError(f"{tmp_path}/one.gguf is not readable")
        assert str(tmp_path) in complete(client).json()["error"]["message"]
        health = client.get("/health")
        assert health.status_code == 503
        assert "cannot open one: see the server log for details" in health.text
        assert str(tmp_path) not in health.text
        library.problem = None
        replaced(tmp_path / "one.gguf", folder / "two.gguf")
        assert text_of(complete(client)) == expected["two"]
        assert client.get("/health").json() == {"status": "ok"}


def test_new_sidecar_changes_the_listing(folder, tmp_path):
    path = Path(shutil.copy(folder / "one.gguf", tmp_path))
    with library_client(Library(tmp_path)) as client:
        assert client.get("/v1/models/one").json()["pop"]["boundary"] == 0
        sidecar = converted(path, tmp_path, boundary=4)
        assert client.get(f"/v1/models/{sidecar.stem}").json()["pop"]["boundary"] == 4


def test_replaced_file_of_single_model_is_reopened(folder, tmp_path, expected):
    path = Path(shutil.copy(folder / "one.gguf", tmp_path))
    app = app_of(opened(path, n_ctx=N_CTX), "mine")
    with app_client(app) as client:
        assert text_of(complete(client)) == expected["one"]
        replaced(path, folder / "two.gguf")
        assert text_of(complete(client)) == expected["two"]
    app.state.models.close()


# --- file names


@pytest.mark.skipif(sys.platform != "linux", reason="file names")
def test_serves_models_with_names_that_are_not_utf8(folder, tmp_path, expected):
    for name in (b"a\xfe", b"a\xff"):
        shutil.copy(folder / "one.gguf", os.fsdecode(bytes(tmp_path) + b"/" + name + b".gguf"))
    Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.gguf")).write_bytes(b"GGUF" + bytes(100))
    with library_client(Library(tmp_path)) as client:
        names = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert names == ["a\\xfe", "a\\xff"]
        for name in names:
            assert text_of(complete(client, model=name)) == expected["one"]
        damaged = client.get("/props", params={"model": "b\\xff"})
        assert damaged.status_code == 500
        assert "b\\udcff.gguf" in damaged.json()["error"]["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="file names")
def test_log_escapes_control_characters(tmp_path):
    (tmp_path / "a\x1b[2J\n12:00:00 all is well.gguf").write_bytes(b"GGUF" + bytes(100))
    with served(f"--models={tmp_path}") as server:
        assert httpx2.get(f"{server.api}/models").json()["data"] == []
        wait_for(lambda: "/v1/models" in server.log)
        assert "skipping a\\x1b[2J\\n12:00:00 all is well:" in server.log
        assert "\x1b" not in server.log
