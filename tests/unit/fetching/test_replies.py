"""Download from a server with wrong replies."""

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from pop_converter.base.errors import PopError
from pop_local.fetching import http_download
from pop_local.fetching.http_download import fetch_url
from support.downloads import HALF, MODEL, OTHER, SHA256, names, pull, reply

# The file has one tensor of bytes, whose size follows from the header's.
WHOLE = b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"x", 1, 1000, 0, 0) + bytes(23 + 4000)


def part(
    start: int,
    end: int,
    *,
    content: bytes = MODEL,
    n_bytes: int = len(MODEL),
    etag: str = f'"{SHA256[:16]}"',
) -> bytes:
    extent = f"Content-Range: bytes {start}-{end - 1}/{n_bytes}"
    headers = (extent, f"Content-Length: {end - start}", f"ETag: {etag}")
    return reply(content[start:end], *headers, status="206 Partial Content")


def test_short_part_is_resumed(hub, tmp_path):
    hub.drops = [HALF]

    def answer_with_less(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, HALF + 100)]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_with_less, force=False)
    assert path.read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.downloads()]
    assert asked == [None, f"bytes={HALF}-", f"bytes={HALF + 100}-"]


@pytest.mark.parametrize("what", [{"etag": '"other"'}, {"n_bytes": len(MODEL) + 1}])
def test_part_of_another_file_is_not_joined(hub, tmp_path, what):
    """Some servers support Range but ignore If-Range."""
    hub.drops = [HALF]

    def answer_from_another(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, len(MODEL), content=OTHER, **what)]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_from_another, force=False)
    assert path.read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.downloads()]
    assert asked == [None, f"bytes={HALF}-", None]


def test_part_without_validator_is_joined(hub, tmp_path):
    hub.drops = [HALF]

    def answer_with_less(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, HALF + 100, etag="W/weak")]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_with_less, force=False)
    assert path.read_bytes() == MODEL
    assert hub.downloads()[-1].headers["if-range"] == f'"{SHA256[:16]}"'


def test_hash_checks_a_download_without_validator(hub, tmp_path):
    hub.raw = [reply(MODEL[:HALF], f"Content-Length: {len(MODEL)}"), part(HALF, len(MODEL))]
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.requests]
    assert asked == [None, f"bytes={HALF}-"]


def test_repeated_parts_end_the_download(hub, tmp_path):
    headers = (f"Content-Length: {len(MODEL)}", f'ETag: "{SHA256[:16]}"')
    again = [reply(MODEL[:HALF], *headers), *[part(HALF, HALF + 100)] * 2]
    hub.raw = again * 4
    with pytest.raises(PopError, match=r"sent the wrong part|was interrupted"):
        pull(hub, tmp_path)


def test_unrequested_part_is_not_a_complete_file(hub, tmp_path):
    hub.raw = [part(0, HALF)]
    assert pull(hub, tmp_path).read_bytes() == MODEL


@pytest.mark.parametrize(
    "headers", [(), ("Content-Length: 1000",)], ids=["no length", "too small a length"]
)
def test_truncated_file_is_deleted(hub, tmp_path, headers):
    hub.raw = [reply(WHOLE[:1000], *headers)]
    with pytest.raises(
        PopError, match=r"tiny\.gguf is truncated: only 1,000 of 4,\d+ bytes present"
    ):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("headers", [(), ("Content-Length: many",)])
def test_reply_without_length_ends_with_the_connection(hub, tmp_path, headers):
    hub.raw = [reply(WHOLE, *headers)]
    assert pull(hub, tmp_path).read_bytes() == WHOLE


@pytest.mark.parametrize("status", ["200 OK", "302 Found"])
def test_compressed_reply_is_refused_without_unpacking(hub, tmp_path, status):
    packed = gzip.compress(WHOLE + bytes(50_000_000))
    headers = ("Content-Encoding: gzip", f"Location: {hub.url('other.gguf')}")
    hub.raw = [reply(packed, *headers, status=status)]
    tracemalloc.start()
    try:
        with pytest.raises(PopError, match=r"compressed .* \(gzip\), which is not supported"):
            pull(hub, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert names(tmp_path) == []


def test_impossible_length_is_ignored(hub, tmp_path):
    hub.raw = [reply(WHOLE, f"Content-Length: {9**500}")]
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_reply_without_length_cannot_fill_the_disk(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(http_download, "_UNANNOUNCED_BYTES", 1_000_000)
    written: list[int] = []

    def usage(folder: Path) -> object:
        partial = tmp_path / "tiny.gguf.partial"
        written.append(partial.stat().st_size if partial.exists() else 0)
        return type("Usage", (), {"free": 5_000_000 - written[-1]})

    monkeypatch.setattr("shutil.disk_usage", usage)
    hub.raw = [reply(WHOLE + bytes(50_000_000))]
    with pytest.raises(PopError, match="MB free"):
        pull(hub, tmp_path)
    assert 3_000_000 < max(written) < 5_000_000


def test_first_bytes_may_arrive_one_by_one(hub, tmp_path):
    chunks = (WHOLE[:2], WHOLE[2:3], WHOLE[3:])
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    hub.raw = [reply(body, "Transfer-Encoding: chunked")]
    assert pull(hub, tmp_path).read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1/s3cret.gguf", "invalid URL"),
        (f"http://{'a' * 70}.example/x.gguf", "cannot be fetched"),
        (f"http://127.0.0.1:1/{'n' * 300}.gguf", "is too long"),
    ],
)
def test_invalid_urls_are_refused(tmp_path, url, message):
    with pytest.raises(PopError, match=message) as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message
    assert names(tmp_path) == []


def test_file_is_synced_before_its_renaming(hub, tmp_path, monkeypatch):
    synced: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(names(tmp_path)))
    pull(hub, tmp_path)
    assert synced and "tiny.gguf" not in synced[-1]
