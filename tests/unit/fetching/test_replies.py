"""Downloads from a server whose replies are not as they should be."""

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

# One tensor of bytes, whose number follows from the header.
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


def test_a_part_that_is_shorter_than_asked_for_is_gone_on_with(hub, tmp_path):
    hub.drops = [HALF]

    def answer_with_less(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, HALF + 100)]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_with_less, force=False)
    assert path.read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.downloads()]
    assert asked == [None, f"bytes={HALF}-", f"bytes={HALF + 100}-"]


@pytest.mark.parametrize("what", [{"etag": '"other"'}, {"n_bytes": len(MODEL) + 1}])
def test_a_part_of_another_file_is_not_joined(hub, tmp_path, what):
    """Some servers support Range and ignore If-Range."""
    hub.drops = [HALF]

    def answer_from_another(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, len(MODEL), content=OTHER, **what)]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_from_another, force=False)
    assert path.read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.downloads()]
    assert asked == [None, f"bytes={HALF}-", None]


def test_a_part_need_not_say_again_what_it_is_of(hub, tmp_path):
    hub.drops = [HALF]

    def answer_with_less(done: int, total: int) -> None:
        if done == HALF:
            hub.raw = [part(HALF, HALF + 100, etag="W/weak")]

    path = fetch_url(hub.url("tiny.gguf"), tmp_path, "", answer_with_less, force=False)
    assert path.read_bytes() == MODEL
    assert hub.downloads()[-1].headers["if-range"] == f'"{SHA256[:16]}"'


def test_the_hash_judges_what_arrived_without_a_validator(hub, tmp_path):
    hub.raw = [reply(MODEL[:HALF], f"Content-Length: {len(MODEL)}"), part(HALF, len(MODEL))]
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL
    asked = [request.headers.get("range") for request in hub.requests]
    assert asked == [None, f"bytes={HALF}-"]


def test_a_server_that_gives_the_same_part_again_and_again_is_left(hub, tmp_path):
    headers = (f"Content-Length: {len(MODEL)}", f'ETag: "{SHA256[:16]}"')
    again = [reply(MODEL[:HALF], *headers), *[part(HALF, HALF + 100)] * 2]
    hub.raw = again * 4
    with pytest.raises(PopError, match=r"another part than requested|broke off"):
        pull(hub, tmp_path)


def test_a_part_that_nobody_asked_for_is_not_the_whole(hub, tmp_path):
    hub.raw = [part(0, HALF)]
    assert pull(hub, tmp_path).read_bytes() == MODEL


@pytest.mark.parametrize(
    "headers", [(), ("Content-Length: 1000",)], ids=["no length", "too small a length"]
)
def test_a_file_that_is_cut_short_is_not_kept(hub, tmp_path, headers):
    hub.raw = [reply(WHOLE[:1000], *headers)]
    with pytest.raises(PopError, match=r"tiny\.gguf is truncated: it needs 4,\d+ bytes"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("headers", [(), ("Content-Length: many",)])
def test_without_a_length_the_end_is_where_the_connection_closes(hub, tmp_path, headers):
    hub.raw = [reply(WHOLE, *headers)]
    assert pull(hub, tmp_path).read_bytes() == WHOLE


@pytest.mark.parametrize("status", ["200 OK", "302 Found"])
def test_a_packed_reply_is_refused_and_nothing_of_it_unpacked(hub, tmp_path, status):
    packed = gzip.compress(WHOLE + bytes(50_000_000))
    headers = ("Content-Encoding: gzip", f"Location: {hub.endpoint}")
    hub.raw = [reply(packed, *headers, status=status)]
    tracemalloc.start()
    try:
        with pytest.raises(PopError, match=r"compressed \(gzip\)"):
            pull(hub, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert names(tmp_path) == []


def test_a_length_that_no_file_has_is_no_length(hub, tmp_path):
    hub.raw = [reply(WHOLE, f"Content-Length: {9**500}")]
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_what_has_no_length_does_not_fill_the_disk(hub, tmp_path, monkeypatch):
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


def test_the_first_bytes_may_come_one_by_one(hub, tmp_path):
    chunks = (WHOLE[:2], WHOLE[2:3], WHOLE[3:])
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    hub.raw = [reply(body, "Transfer-Encoding: chunked")]
    assert pull(hub, tmp_path).read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1/s3cret.gguf", "invalid address"),
        (f"http://{'a' * 70}.example/x.gguf", "cannot be fetched"),
        (f"http://127.0.0.1:1/{'n' * 300}.gguf", "is too long"),
    ],
)
def test_bad_addresses(tmp_path, url, message):
    with pytest.raises(PopError, match=message) as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message
    assert names(tmp_path) == []


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(hub, tmp_path, monkeypatch):
    synced: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(names(tmp_path)))
    pull(hub, tmp_path)
    assert synced and "tiny.gguf" not in synced[-1]
