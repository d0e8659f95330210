"""Test a failure of each write, rename and folder operation in turn.

The old file stays or the new file is complete, no other file remains, and one error reports the
reason.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from pop_base.errors import PopError
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import read_session, write_session
from pop_local.models import resumable_download
from support.calls import opened
from support.converted import names
from support.faults import FAULTS, failing
from support.hub_server import Hub, Repo, serving, use_hub
from support.program import called
from support.synthetic import TEMPLATE, make_gguf

SMALL = MappingProxyType({"n_layer": 3, "n_embd": 64, "n_ff": 64})
NAME = "out.gguf"


@pytest.fixture(params=FAULTS)
def number(request) -> int:
    return FAULTS[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_gguf(folder / "model.gguf", "llama", chat_template=TEMPLATE, **SMALL)


def check(
    folder: Path,
    number: int,
    work: Callable[[Path], str],
    is_whole: Callable[[Path], bool],
    kept: frozenset[str] = frozenset(),
    *,
    makes_folder: bool = False,
) -> None:
    """Repeat `work`, which writes a file into a folder and returns its error, until it succeeds.

    `kept`: files that may remain after an error. `makes_folder`: `work` creates a missing folder.
    """
    seen = []
    for before in (None, b"mine"):
        at, hit = 0, "nothing yet"
        while hit:
            below = folder / f"{at} {before!r}"
            out = below / NAME
            if before is not None:
                below.mkdir()
                out.write_bytes(before)
            elif not makes_folder:
                below.mkdir()
            with failing(below, at, number) as fault:
                error = work(below)
            hit = fault.hit
            seen.append(hit)
            found = out.read_bytes() if out.exists() else None
            assert error or is_whole(out), (at, hit)
            assert found == before or is_whole(out), (at, hit)
            there = names(below) if below.exists() else set()
            left = there - {NAME} - (kept if error else set())
            # A file remains if its removal fails.
            assert len(left) <= (hit == "unlink"), (at, hit, left)
            if error and kept:
                assert not work(below) and is_whole(out) and names(below) == {NAME}
            at += 1
        assert not error
        assert at > 1
    print(*seen)


def command(*words: object) -> str:
    done = called(*words)
    assert done.returncode == done.stderr.count("error: ") <= 1, done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("form", ["copy", "sidecar"])
def test_convert_survives_file_errors(model, tmp_path, number, form, monkeypatch):
    options = ["--boundary", 1, "--projection", "own", "--force"]
    options += ["--sidecar"] if form == "sidecar" else []
    assert not command("convert", model, tmp_path / NAME, *options)
    whole = (tmp_path / NAME).read_bytes()
    check(
        tmp_path,
        number,
        lambda folder: command("convert", model, folder / NAME, *options),
        lambda path: path.read_bytes() == whole,
    )


def test_pull_survives_file_errors(model, tmp_path, number, monkeypatch):
    content = model.read_bytes()
    monkeypatch.setattr(resumable_download, "_PAUSE_S", 0.0)
    with serving(Hub(repos={"a/b": Repo({NAME: content})})) as hub:
        use_hub(hub, monkeypatch)
        check(
            tmp_path,
            number,
            lambda folder: command("pull", "hf:a/b", "--dir", folder, "--force"),
            lambda path: path.read_bytes() == content,
            kept=frozenset({f"{NAME}.partial"}),
            makes_folder=True,
        )


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except PopError as error:
        return error.message
    return ""


def test_saving_session_survives_file_errors(model, tmp_path, number):
    said = Conversation("Be brief.", (Turn("who?"),))
    with opened(model, n_ctx=64) as asked:
        check(
            tmp_path,
            number,
            lambda folder: refusal(lambda: write_session(folder / NAME, asked.engine, said)),
            lambda path: read_session(path).conversation == said,
            makes_folder=True,
        )
