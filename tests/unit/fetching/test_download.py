"""Fetching from a URL, against a local server: resumed, checked, refused."""

import hashlib

import pytest

from pop_converter.base.errors import PopError
from pop_local.fetching import http_download
from pop_local.fetching.http_download import fetch_url
from support.downloads import CHUNK, HALF, MODEL, OTHER, SHA256, names, pull, reply
from support.hub_server import Hub, serving


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_a_file_arrives_whole_and_alone(hub, tmp_path, sha256):
    seen: list[tuple[int, int]] = []
    path = fetch_url(
        hub.url("tiny.gguf"), tmp_path / "new", sha256, lambda *at: seen.append(at), force=False
    )
    assert path.read_bytes() == MODEL
    assert names(path.parent) == ["tiny.gguf"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(MODEL), len(MODEL))


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.drops = [HALF, CHUNK]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers.get("range") for request in hub.downloads()] == [
        None,
        f"bytes={HALF}-",
        f"bytes={HALF + CHUNK}-",
    ]


def test_a_connection_may_break_often_while_bytes_come(hub, tmp_path):
    hub.drops = [CHUNK] * 6
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_a_part_that_was_not_asked_for_is_not_taken(hub, tmp_path):
    hub.drops = [HALF]
    hub.headers = {"Content-Range": "bytes 7-9/10"}
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers.get("range") for request in hub.downloads()] == [
        None,
        f"bytes={HALF}-",
        None,
    ]


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_the_next_run_goes_on_with_what_arrived(hub, tmp_path, sha256):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match="broke off") as failure:
        pull(hub, tmp_path, sha256=sha256)
    assert "will resume" in failure.value.hint
    assert names(tmp_path) == ["tiny.gguf.partial", "tiny.gguf.partial.origin"]
    assert (tmp_path / "tiny.gguf.partial").read_bytes() == MODEL[:HALF]
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=sha256).read_bytes() == MODEL
    assert [request.headers["range"] for request in hub.downloads()] == [f"bytes={HALF}-"]
    assert names(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize("sha256", ["", SHA256])
def test_a_whole_file_that_only_lacks_its_name_is_not_fetched_again(hub, tmp_path, sha256):
    def interrupt_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, sha256, interrupt_at_the_end, force=False)
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=sha256).read_bytes() == MODEL
    assert hub.requests == []


def test_damage_to_what_arrived_before_is_found(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, sha256=SHA256)
    partial = tmp_path / "tiny.gguf.partial"
    partial.write_bytes(b"GGUF" + bytes(HALF - 4))
    with pytest.raises(PopError, match="damaged"):
        pull(hub, tmp_path, sha256=SHA256)
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL


def test_an_interrupt_keeps_what_arrived(hub, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, "", interrupt, force=False)
    assert not (tmp_path / "tiny.gguf").exists()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert "range" in hub.downloads()[-1].headers


def test_two_at_once_do_not_mix(hub, tmp_path):
    hub.stall = HALF

    def second(done: int, total: int) -> None:
        with pytest.raises(PopError, match="another process is fetching"):
            pull(hub, tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_url(hub.url("tiny.gguf"), tmp_path, "", second, force=False)
    hub.stopped.set()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert names(tmp_path) == ["tiny.gguf"]


def test_secrets_of_an_address_are_neither_shown_nor_kept(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    url = hub.url("tiny.gguf").replace("http://", "http://me:s3cret@") + "?key=s3cret"
    with pytest.raises(PopError):
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in (tmp_path / "tiny.gguf.partial.origin").read_text()
    hub.plain.clear()
    with pytest.raises(PopError, match="does not exist") as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message


def test_a_redirect_that_leads_nowhere_is_said_without_its_query(hub, tmp_path):
    hub.redirects_to = "ftp://127.0.0.1/tiny.gguf?key=s3cret"
    with pytest.raises(PopError) as failure:
        pull(hub, tmp_path)
    assert failure.value.message == f"{hub.url('tiny.gguf')} cannot be fetched (InvalidSchema)"
    assert names(tmp_path) == []


def test_no_tls_is_said_without_the_query(hub, tmp_path):
    url = hub.url("tiny.gguf").replace("http://", "https://") + "?key=s3cret"
    with pytest.raises(PopError, match=r"no secure connection to 127\.0\.0\.1: \w+") as failure:
        fetch_url(url, tmp_path, "", lambda done, total: None, force=False)
    assert "s3cret" not in failure.value.message
    assert "Error" not in failure.value.message
    assert names(tmp_path) == []


def test_a_file_that_changed_meanwhile_is_fetched_anew(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.plain["tiny.gguf"] = OTHER
    assert pull(hub, tmp_path).read_bytes() == OTHER


def test_a_shorter_file_meanwhile_is_fetched_anew(hub, tmp_path):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, sha256=SHA256)
    short = OTHER[:200_000]
    hub.plain["tiny.gguf"] = short
    hub.headers = {"ETag": f'"{SHA256[:16]}"'}  # a server that does not tell them apart
    digest = hashlib.sha256(short).hexdigest()
    assert pull(hub, tmp_path, sha256=digest).read_bytes() == short


def test_another_address_of_that_name_is_not_gone_on_with(hub, tmp_path):
    hub.headers = {"ETag": '"same"'}
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.plain["other/tiny.gguf"] = OTHER
    assert pull(hub, tmp_path, "other/tiny.gguf").read_bytes() == OTHER


def test_without_a_validator_it_begins_anew(hub, tmp_path):
    hub.headers = {"ETag": 'W/"weak"'}
    hub.drops = [HALF]
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert all("range" not in request.headers for request in hub.downloads())


def test_what_cannot_be_gone_on_with_is_not_promised(hub, tmp_path):
    hub.headers = {"ETag": 'W/"weak"'}
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError, match="broke off") as failure:
        pull(hub, tmp_path)
    assert failure.value.hint == "check the network and try again"


def test_a_server_without_ranges_sends_all_again(hub, tmp_path):
    hub.ignores_ranges = True
    hub.drops = [HALF]
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_a_busy_server_is_asked_again(hub, tmp_path):
    hub.busy = 2
    assert pull(hub, tmp_path).read_bytes() == MODEL


def test_a_server_that_stays_busy_is_named(hub, tmp_path):
    hub.busy = 100
    with pytest.raises(PopError, match=r"127\.0\.0\.1: the server answers 503"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_hash_keeps_nothing(hub, tmp_path):
    with pytest.raises(PopError, match=f"its sha256 is {SHA256}, not {'0' * 64}"):
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
def test_what_is_no_gguf_is_refused(hub, tmp_path, content, kind, what):
    hub.plain["tiny.gguf"] = content
    hub.headers = {"Content-Type": kind}
    with pytest.raises(PopError, match=what):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("page", [b"<html>sign in</html>", b"", b"GG"])
def test_a_page_in_between_leaves_what_arrived(hub, tmp_path, page):
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path)
    hub.raw = [reply(page, f"Content-Length: {len(page)}", 'ETag: "page"')]
    with pytest.raises(PopError, match=r"is not a GGUF file|is empty"):
        pull(hub, tmp_path)
    hub.requests.clear()
    assert pull(hub, tmp_path).read_bytes() == MODEL
    assert [request.headers["range"] for request in hub.downloads()] == [f"bytes={HALF}-"]


def test_nothing_there(hub, tmp_path):
    with pytest.raises(PopError, match="does not exist"):
        pull(hub, tmp_path, "absent.gguf")
    assert names(tmp_path) == []


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setattr(http_download, "_PAUSE_S", 0.0)
    with serving(Hub()) as hub:
        pass
    with pytest.raises(PopError, match="connection failed"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []


def test_an_existing_file_is_replaced_only_by_force(hub, tmp_path):
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    for sha256 in ("", SHA256):
        with pytest.raises(PopError, match="exists"):
            pull(hub, tmp_path, sha256=sha256)
    assert target.read_bytes() == b"mine"
    assert pull(hub, tmp_path, force=True).read_bytes() == MODEL


def test_the_existing_file_stays_until_the_new_one_is_whole(hub, tmp_path):
    target = tmp_path / "tiny.gguf"
    target.write_bytes(b"mine")
    hub.drops = [HALF, 0, 0, 0]
    with pytest.raises(PopError):
        pull(hub, tmp_path, force=True)
    assert target.read_bytes() == b"mine"


def test_the_right_file_is_not_fetched_again(hub, tmp_path):
    pull(hub, tmp_path, sha256=SHA256)
    hub.requests.clear()
    assert pull(hub, tmp_path, sha256=SHA256).read_bytes() == MODEL
    assert hub.requests == []


def test_too_little_space_is_said_before_anything_is_written(hub, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(PopError, match="0 MB free"):
        pull(hub, tmp_path)
    assert names(tmp_path) == []
