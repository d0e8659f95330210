"""Download files from a local server: resumption, hashes, wrong replies and errors."""

import gzip
import os
import ssl
import tracemalloc

import pytest

from pop_base.errors import PopError
from pop_local.models import resumable_download
from pop_local.models.resumable_download import reason_of
from support.downloads import CHUNK, HALF, MODEL, OTHER, SHA256, names, pull, reply
from support.hub_server import Hub, serving

PARTIAL = "tiny.gguf.partial"


def ranges(hub: Hub) -> list[str | None]:
    return [request.headers.get("range") for request in hub.requests]


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_download_leaves_only_the_complete_file(hub, tmp_path, sha256):
    seen: list[tuple[int, int]] = []
    path = pull(hub, tmp_path, sha256=sha256, advance=lambda *at: seen.append(at))
    assert path.read_bytes() == MODEL
    assert names(tmp_path) == ["tiny.gguf"]
    assert seen == sorted(seen) and len(seen) > 2
    assert seen[-1] == (len(MODEL), len(MODEL))


def test_broken_connection_is_resumed(hub, tmp_path):
    hub.drops = [HALF, CHUNK]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert ranges(hub) == [None, f"bytes={HALF}-", f"bytes={HALF + CHUNK}-"]


def test_progress_resets_the_failure_count(hub, tmp_path):
    hub.drops = [CHUNK] * 6
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_next_call_resumes(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match=r"from 127\.0\.0\.1 was interrupted") as failure:
        pull(hub, tmp_path)
    assert "try again (the download will resume)" in failure.value.hint
    assert names(tmp_path) == [PARTIAL]
    assert (tmp_path / PARTIAL).read_bytes() == MODEL[:HALF]
    hub.requests.clear()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert ranges(hub) == [f"bytes={HALF}-"]
    assert names(tmp_path) == ["tiny.gguf"]


def test_file_without_a_hash_starts_over(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match="was interrupted") as failure:
        pull(hub, tmp_path, sha256="")
    assert failure.value.hint == "check your network connection and try again"
    hub.plain["tiny.gguf"] = OTHER
    assert pull(hub, tmp_path, sha256="").read_bytes() == OTHER


def test_complete_partial_file_is_not_requested_again(hub, tmp_path):
    (tmp_path / PARTIAL).write_bytes(MODEL)
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert hub.requests == []


@pytest.mark.parametrize("content", [OTHER[:HALF], OTHER])
def test_partial_of_another_file_is_deleted(hub, tmp_path, content):
    (tmp_path / PARTIAL).write_bytes(content)
    with pytest.raises(PopError, match=f"damaged .* but {SHA256} was"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_partial_that_is_too_large_is_replaced(hub, tmp_path):
    (tmp_path / PARTIAL).write_bytes(MODEL + b"more")
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert ranges(hub) == [None]


def test_linked_partial_does_not_overwrite_its_target(hub, tmp_path):
    (tmp_path / "notes").write_bytes(MODEL[:HALF])
    (tmp_path / PARTIAL).symlink_to(tmp_path / "notes")
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert (tmp_path / "notes").read_bytes() == MODEL[:HALF]


def test_server_without_ranges_starts_over(hub, tmp_path):
    hub.ignores_ranges = True
    hub.drops = [HALF]
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_interrupt_keeps_received_bytes(hub, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(hub, tmp_path, advance=interrupt)
    assert names(tmp_path) == [PARTIAL]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert ranges(hub)[-1] == f"bytes={CHUNK}-"


def test_concurrent_downloads_are_locked(hub, tmp_path):
    hub.stall = HALF

    def second(done: int, total: int) -> None:
        with pytest.raises(PopError, match="another process is downloading"):
            pull(hub, tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(hub, tmp_path, advance=second)
    hub.stopped.set()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert names(tmp_path) == ["tiny.gguf"]


def test_wrong_hash_deletes_the_file(hub, tmp_path):
    with pytest.raises(PopError, match=f"its SHA-256 is {SHA256}, but {'0' * 64} was"):
        pull(hub, tmp_path, sha256="0" * 64)
    assert names(tmp_path) == []


def test_existing_file_stays_until_the_download_completes(hub, tmp_path):
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    assert target.read_bytes() == b"mine"
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_file_is_synced_before_its_renaming(hub, tmp_path, monkeypatch):
    synced: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(names(tmp_path)))
    pull(hub, tmp_path)
    assert synced and "tiny.gguf" not in synced[-1]


def test_empty_file_is_refused(hub, tmp_path):
    with pytest.raises(PopError, match="is empty"):
        pull(hub, tmp_path, size_bytes=0)
    assert hub.requests == []


# --- wrong replies


def test_busy_server_is_tried_again(hub, tmp_path):
    hub.busy = 2
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_permanently_busy_server_is_reported(hub, tmp_path):
    hub.busy = 100
    with pytest.raises(PopError, match="HTTP status 503 for tiny"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_missing_file_is_reported_at_once(hub, tmp_path):
    with pytest.raises(PopError, match="HTTP status 404"):
        pull(hub, tmp_path, name="absent.gguf")
    assert names(tmp_path) == []
    assert len(hub.requests) == 1


def test_unreachable_server_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_download, "_PAUSE_S", 0.0)
    with serving(Hub()) as hub:
        pass
    with pytest.raises(PopError, match="was interrupted"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_short_reply_is_continued(hub, tmp_path):
    hub.raw = [reply(MODEL[:HALF], f"Content-Length: {HALF}")]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert ranges(hub) == [None, f"bytes={HALF}-"]


def test_longer_reply_cannot_fill_the_disk(hub, tmp_path):
    hub.plain["tiny.gguf"] = MODEL + bytes(50_000_000)
    with pytest.raises(PopError, match=f"more than {len(MODEL):,} bytes for tiny"):
        pull(hub, tmp_path)
    assert (tmp_path / PARTIAL).stat().st_size <= len(MODEL)
    hub.plain["tiny.gguf"] = MODEL
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_compressed_reply_is_not_unpacked(hub, tmp_path):
    packed = gzip.compress(MODEL + bytes(50_000_000))
    hub.raw = [reply(packed, "Content-Encoding: gzip", f"Content-Length: {len(packed)}")]
    tracemalloc.start()
    try:
        with pytest.raises(PopError, match=r"damaged|more than"):
            pull(hub, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_broken_redirect_is_reported_without_its_query(hub, tmp_path):
    hub.redirects_to = "ftp://127.0.0.1/tiny.gguf?key=s3cret"
    with pytest.raises(PopError, match="was interrupted") as failure:
        pull(hub, tmp_path)
    assert "s3cret" not in failure.value.message
    assert names(tmp_path) == []


def test_untrusted_certificate_is_reported():
    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
    refused.verify_message = "certificate has expired"
    try:
        try:
            raise refused
        except ssl.SSLError as inner:
            raise RuntimeError("/tiny.gguf?key=s3cret") from inner
    except RuntimeError as error:
        assert reason_of(error) == "certificate has expired"
