"""Download from a local server that imitates the hub, with the hub's real client."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pop_local.models import resumable_download
from support.hub_server import COMMIT, Hub, Repo, serving, use_hub
from support.program import Done, called, run


def content(seed: int, n_bytes: int = 400_000) -> bytes:
    return b"GGUF" + random.Random(seed).randbytes(n_bytes)


FILES = {
    "README.md": b"# Tiny",
    "imatrix-tiny.gguf": content(0, 100),
    "tiny-Q4_K_M.gguf": content(1),
    "tiny-Q4_K_S.gguf": content(2, 100),
    "tiny-Q8_0.gguf": content(3, 100),
    "big/tiny-BF16-00001-of-00002.gguf": content(4),
    "big/tiny-BF16-00002-of-00002.gguf": content(5),
}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(resumable_download, "_PAUSE_S", 0.0)
    with serving(Hub(repos={"acme/tiny-GGUF": Repo(FILES)})) as hub:
        use_hub(hub, monkeypatch)
        yield hub


def pull(folder: Path, name: str, *options: str, **environment: str) -> Done:
    return called("pull", name, "--dir", folder, *options, **environment)


def pull_by_environment(hub: Hub, folder: Path, **environment: str) -> Done:
    """Run pull in a separate process, since the client reads some variables once."""
    home = {"HF_HOME": str(folder.parent / "hf-home")}
    variables = hub.environment() | home | environment
    return run("pull", "hf:acme/tiny-GGUF", "--dir", folder, **variables)


def failed(done: Done) -> tuple[str, str]:
    """Return the error and its hint."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return error, hint


def test_default_quant_is_fetched_and_its_path_printed(hub, tmp_path):
    folder = tmp_path / "models"
    done = pull_by_environment(hub, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'tiny-Q4_K_M.gguf'}\n"
    assert "license: apache-2.0" in done.stderr
    assert "tiny-Q4_K_M.gguf (400.0 kB)" in done.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "tiny-Q4_K_M.gguf": FILES["tiny-Q4_K_M.gguf"]
    }
    resolved = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert set(resolved) == {f"/acme/tiny-GGUF/resolve/{COMMIT}/tiny-Q4_K_M.gguf"}


def test_all_parts_of_a_split_model_are_fetched(hub, tmp_path):
    folder = tmp_path / "models"
    done = pull(folder, "hf:acme/tiny-GGUF:bf16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'tiny-BF16-00001-of-00002.gguf'}\n"
    for number in (1, 2):
        name = f"tiny-BF16-0000{number}-of-00002.gguf"
        assert (folder / name).read_bytes() == FILES[f"big/{name}"]
    assert len(list(folder.iterdir())) == 2


def test_upper_case_suffix_becomes_lower_case(hub, tmp_path):
    files = {name.replace(".gguf", ".GGUF"): text for name, text in FILES.items()}
    hub.repos["acme/tiny-GGUF"] = Repo(files)
    folder = tmp_path / "models"
    done = pull(folder, "hf:acme/tiny-GGUF:bf16")
    assert done.returncode == 0, done.stderr
    names = [f"tiny-BF16-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert done.stdout == f"{folder / names[0]}\n"


def test_file_with_another_hash_is_refused(hub, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    wrong = content(9)
    monkeypatch.setattr("support.hub_server._Handler._by_hash", lambda self, sha256: wrong)
    error, _ = failed(pull(folder, "hf:acme/tiny-GGUF"))
    assert hashlib.sha256(wrong).hexdigest() in error
    assert hashlib.sha256(FILES["tiny-Q4_K_M.gguf"]).hexdigest() in error
    assert list(folder.iterdir()) == []


def test_token_is_sent_to_the_hub_only(hub, tmp_path):
    hub.repos["acme/tiny-GGUF"].token = "hf_secret"
    hub.repos["acme/tiny-GGUF"].gated = True
    done = pull(tmp_path / "models", "hf:acme/tiny-GGUF", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert all("authorization" not in request.headers for request in hub.downloads())


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_gated_repository_is_explained(hub, tmp_path, token):
    hub.repos["acme/tiny-GGUF"] = Repo(FILES, token="hf_secret", gated=True)
    error, hint = failed(pull(tmp_path / "models", "hf:acme/tiny-GGUF", HF_TOKEN=token))
    assert "acme/tiny-GGUF is gated" in error
    assert "HF_TOKEN" in hint


def test_missing_repository_is_explained(hub, tmp_path):
    hub.repos["acme/tiny-GGUF"] = Repo(FILES, token="hf_secret")
    for name in ("acme/tiny-GGUF", "acme/nothing"):
        error, hint = failed(pull(tmp_path / "models", f"hf:{name}"))
        assert f"the repository {name} does not exist or is private" in error
        assert "HF_TOKEN" in hint
    assert not (tmp_path / "models").exists()


def test_unreachable_hub_is_reported(tmp_path, monkeypatch):
    with serving(Hub()) as hub:
        use_hub(hub, monkeypatch)
    error, hint = failed(pull(tmp_path / "models", "hf:acme/tiny-GGUF"))
    assert "the hub cannot be reached" in error
    assert "HF_ENDPOINT" in hint


@pytest.mark.parametrize(
    "texts", [{"HF_ENDPOINT": "SECRET.example/x"}, {"HTTP_PROXY": "foo://me:SECRET@127.0.0.1:1"}]
)
def test_client_warnings_are_hidden(hub, tmp_path, texts):
    error, hint = failed(pull_by_environment(hub, tmp_path / "models", **texts))
    assert error.startswith(("error: the hub cannot be ", "error: the hub request"))
    assert "SECRET" not in error + hint and "secure" not in error
    assert "HF_ENDPOINT" in hint


def test_invalid_token_is_reported(hub, tmp_path):
    done = pull(tmp_path / "models", "hf:acme/tiny-GGUF", HF_TOKEN="hf_s\u00e4cret")
    error, hint = failed(done)
    assert "HF_TOKEN" in hint and "cret" not in error


def test_offline_mode_is_reported(hub, tmp_path):
    done = pull_by_environment(hub, tmp_path / "models", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in failed(done)[1]


@pytest.mark.parametrize("name", ["hf:tiny", "hf:a/b/c", "hf:", "hf:--/..", "hf:a/b:"])
def test_invalid_repository_names_are_refused(hub, tmp_path, name):
    error, hint = failed(pull(tmp_path / "models", name))
    assert "is not " in error
    assert "hf:OWNER/REPO" in hint


def test_file_without_a_hash_causes_a_warning(hub, tmp_path):
    hub.repos["acme/tiny-GGUF"].in_git = True
    done = pull(tmp_path / "models", "hf:acme/tiny-GGUF:Q8_0")
    assert done.returncode == 0, done.stderr
    assert "was not verified" in done.stderr


def test_different_existing_file_is_kept(hub, tmp_path):
    (tmp_path / "models").mkdir()
    target = tmp_path / "models" / "tiny-Q8_0.gguf"
    target.write_bytes(b"mine")
    error, hint = failed(pull(tmp_path / "models", "hf:acme/tiny-GGUF:Q8_0"))
    assert "its SHA-256 does not match" in error
    assert "--force" in hint
    assert target.read_bytes() == b"mine"
    done = pull(tmp_path / "models", "hf:acme/tiny-GGUF:Q8_0", "--force")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == FILES["tiny-Q8_0.gguf"]
