"""Download from URLs of a local server: resumption, checks and errors."""

import hashlib

import pytest

from pop_converter.base.errors import PopError
from pop_local.fetching import http_download
from pop_local.fetching.http_download import fetch_url
from support.downloads import CHUNK, HALF, MODEL, OTHER, SHA256, names, pull, reply
from support.hub_server import Hub, serving


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_download_leaves_only_the_complete_file(hub, tmp_path, sha256):
    seen: list[tuple[int, int]] = []
    path = fetch_url(
        hub.url("tiny.gguf"), tmp_path / "new", sha256, lambda *at: seen.append(at), force=False
    )
    assert path.read_bytes() == MODEL
    assert names(path.parent) == ["tiny.gguf"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(MODEL), len(MODEL))


def test_broken_connection_is_resumed(hub, tmp_path):
    hub.drops = [HALF, CHUNK]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers.get("range") for request in hub.downloads()] == [
        None,
        f"bytes={HALF}-",
        f"bytes={HALF + CHUNK}-",
    ]


def test_progress_resets_the_failure_count(hub, tmp_path):
    hub.drops = [CHUNK] * 6
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_unrequested_part_is_rejected(hub, tmp_path):
    hub.drops = [HALF]
    hub.headers = {"Content-Range": "bytes 7-9/10"}
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers.get("range") for request in hub.downloads()] == [
        None,
        f"bytes={HALF}-",
        None,
    ]


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_next_run_resumes(hub, tmp_path, sha256):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match="was interrupted") as failure:
        pull(hub, tmp_path, sha256=sha256)
    assert "will resume" in failure.value.hint
    assert names(tmp_path) == ["tiny.gguf.partial", "tiny.gguf.partial.origin"]
    assert (tmp_path / "tiny.gguf.partial").read_bytes() == MODEL[:HALF]
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=sha256).read_bytes() == MODEL
    assert [request.headers["range"] for request in hub.downloads()] == [f"bytes={HALF}-"]
    assert names(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_complete_partial_file_is_not_fetched_again(hub, tmp_path, sha256):
    def interrupt_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, sha256, interrupt_at_the_end, force=False)
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=sha256).read_bytes() == MODEL
    assert hub.requests == []


def test_damaged_partial_file_is_detected(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, sha256=SHA256)
    partial = tmp_path / "tiny.gguf.partial"
    partial.write_bytes(b"GGUF" + bytes(HALF - 4))
    with pytest.raises(PopError, match="damaged"):
        pull(hub, tmp_path, sha256=SHA256)
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL


def test_interrupt_keeps_received_bytes(hub, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, "", interrupt, force=False)
    assert not (tmp_path / "tiny.gguf").exists()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert "range" in hub.downloads()[-1].headers


def test_concurrent_downloads_are_locked(hub, tmp_path):
    hub.stall = HALF

    def second(done: int, total: int) -> None:
        with pytest.raises(PopError, match="another process is downloading"):
            pull(hub, tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, "", second, force=False)
    hub.stopped.set()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert names(tmp_path) == ["tiny.gguf"]


def test_secrets_of_urls_are_neither_shown_nor_stored(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    url = hub.url("tiny.gguf").replace("http://", "http://me:s3cret@") + "?key=s3cret"
    with pytest.raises(PopError):
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in (tmp_path / "tiny.gguf.partial.origin").read_text()
    hub.plain.clear()
    with pytest.raises(PopError, match="does not exist") as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message


def test_broken_redirect_is_reported_without_its_query(hub, tmp_path):
    hub.redirects_to = "ftp://127.0.0.1/tiny.gguf?key=s3cret"
    with pytest.raises(PopError) as failure:
        pull(hub, tmp_path)
    assert failure.value.message == f"{hub.url('tiny.gguf')} cannot be fetched (InvalidSchema)"
    assert names(tmp_path) == []


def test_tls_failure_is_reported_without_the_query(hub, tmp_path):
    url = hub.url("tiny.gguf").replace("http://", "https://") + "?key=s3cret"
    with pytest.raises(PopError, match=r"secure connection to 127\.0\.0\.1: \w+") as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message
    assert "Error" not in failure.value.message
    assert names(tmp_path) == []


def test_changed_file_is_restarted(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.plain["tiny.gguf"] = OTHER
    assert pull(hub, tmp_path).read_bytes() == OTHER


def test_shortened_file_is_restarted(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, sha256=SHA256)
    short = OTHER[:200_000]
    hub.plain["tiny.gguf"] = short
    hub.headers = {"ETag": f'"{SHA256[:16]}"'}  # a server that does not tell them apart
    digest = hashlib.sha256(short).hexdigest()
    assert pull(hub, tmp_path, sha256=digest).read_bytes() == short


def test_partial_file_of_another_url_is_not_resumed(hub, tmp_path):
    hub.headers = {"ETag": '"same"'}
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.plain["other/tiny.gguf"] = OTHER
    assert pull(hub, tmp_path, "other/tiny.gguf").read_bytes() == OTHER


def test_download_without_validator_restarts(hub, tmp_path):
    hub.headers = {"ETag": 'W/"weak"'}
    hub.drops = [HALF]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert all("range" not in request.headers for request in hub.downloads())


def test_hint_promises_resumption_only_if_possible(hub, tmp_path):
    hub.headers = {"ETag": 'W/"weak"'}
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match="was interrupted") as failure:
        pull(hub, tmp_path)
    assert failure.value.hint == "check the network and try again"


def test_server_without_ranges_restarts(hub, tmp_path):
    hub.ignores_ranges = True
    hub.drops = [HALF]
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_busy_server_is_tried_again(hub, tmp_path):
    hub.busy = 2
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_permanently_busy_server_is_reported(hub, tmp_path):
    hub.busy = 100
    with pytest.raises(PopError, match=r"127\.0\.0\.1: the server returned HTTP status 503"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_wrong_hash_deletes_the_file(hub, tmp_path):
    with pytest.raises(PopError, match=f"the SHA-256 is {SHA256}, not {'0' * 64}"):
        pull(hub, tmp_path, sha256="0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "kind", "what"),
    [
        (b"<html>sign in</html>", "text/html; charset=utf-8", "is a web page"),
        (b"PK\x03\x04 a zip", "application/zip", "is not a GGUF file"),
        (b"GG", "binary/octet-stream", "is not a GGUF file"),
        (b"", "binary/octet-stream", "is empty"),
    ],
)
def test_non_gguf_files_are_refused(hub, tmp_path, content, kind, what):
    hub.plain["tiny.gguf"] = content
    hub.headers = {"Content-Type": kind}
    with pytest.raises(PopError, match=what):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("page", [b"<html>sign in</html>", b"", b"GG"])
def test_login_page_keeps_received_bytes(hub, tmp_path, page):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.raw = [reply(page, f"Content-Length: {len(page)}", 'ETag: "page"')]
    with pytest.raises(PopError, match=r"is not a GGUF file|is empty"):
        pull(hub, tmp_path)
    hub.requests.clear()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers["range"] for request in hub.downloads()] == [f"bytes={HALF}-"]


def test_missing_file_is_reported(hub, tmp_path):
    with pytest.raises(PopError, match="does not exist"):
        pull(hub, tmp_path, "absent.gguf")
    assert names(tmp_path) == []


def test_unreachable_server_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(http_download, "_PAUSE_S", 0.0)
    with serving(Hub()) as hub:
        pass
    with pytest.raises(PopError, match="connection failed"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_existing_file_is_replaced_only_by_force(hub, tmp_path):
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    for sha256 in ("", SHA256):
        with pytest.raises(PopError, match="exists"):
            pull(hub, tmp_path, sha256=sha256)
    assert target.read_bytes() == b"mine"
    assert pull(hub, tmp_path, force=True).read_bytes() == MODEL


def test_existing_file_stays_until_the_download_completes(hub, tmp_path):
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, force=True)
    assert target.read_bytes() == b"mine"


def test_existing_file_with_the_hash_is_kept(hub, tmp_path):
    pull(hub, tmp_path, sha256=SHA256)
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL
    assert hub.requests == []


def test_full_disk_is_reported_before_writing(hub, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(PopError, match="0 MB free"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []
