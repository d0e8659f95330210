"""Damaged and forged sessions cause one error, or a rereading."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pop_converter.base.errors import PopError
from pop_local.engine.cache.saved_state import encoded_array
from pop_local.engine.model import PopModel
from pop_local.engine.sessions.session_file import Sessions
from support.conversations import QUESTION, answered, follow_up, opened


@pytest.fixture(scope="module")
def whole(chat_model, tmp_path_factory) -> tuple[PopModel, bytes]:
    """Return a model that has answered, and its saved session."""
    sessions, model = Sessions(tmp_path_factory.mktemp("whole")), opened(chat_model)
    sessions.save("talk", model.engine, answered(model, QUESTION))
    return model, sessions.path("talk").read_bytes()


@pytest.fixture
def talk(whole, sessions) -> tuple[PopModel, Path]:
    """Return the model, and a copy of the session to damage."""
    model, content = whole
    path = sessions.path("talk")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return model, path


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other zip", "no object"])
def test_a_damaged_session_is_one_error_and_changes_nothing(talk, sessions, damage):
    model, path = talk
    content = path.read_bytes()
    middle = len(content) // 2
    if damage in ("other zip", "no object"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("session.json", '{"format": 3}' if damage == "other zip" else "null")
    else:
        path.write_bytes(
            {
                "cut": content[:middle],
                "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "empty": b"",
                "text": b"not a session",
            }[damage]
        )
    n_tokens = model.engine.cache.n_tokens
    with pytest.raises(PopError, match="damaged or is not a session file") as refused:
        sessions.load("talk", model.engine)
    assert "delete" not in refused.value.hint, "the copy may be incomplete"
    assert model.engine.cache.n_tokens == n_tokens
    assert [stored.name for stored in sessions.listed()] == ["talk"]


def rewritten(path: Path, **members: Any) -> None:
    """Replace members of the archive, and fields of session.json by path."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    session = json.loads(contents["session.json"])
    for place, value in members.pop("fields", {}).items():
        *outer, last = place.split(".")
        at: Any = session
        for key in outer:
            at = at[int(key) if key.isdecimal() else key]
        at[last] = value
    contents["session.json"] = json.dumps(session).encode()
    contents |= {name.replace("_", "."): content for name, content in members.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


TURN = "conversation.turns.0"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", True),
        ("format", "3"),
        ("unknown", 1),
        ("name", []),
        ("model", None),
        ("n_tokens", "many"),
        ("n_tokens", True),
        ("n_tokens", -1),
        ("n_tokens", 10**30),
        ("n_tokens", 1e30),
        ("mode", "SOMETIMES"),
        ("mode", []),
        ("key", 1),
        ("fingerprint", None),
        ("fingerprint.model_bytes", 2**70),
        ("fingerprint.backend", 7),
        ("fingerprint.mmproj", None),
        ("conversation", []),
        ("conversation.system", {}),
        ("conversation.turns", {"a": 1}),
        (TURN, "a question"),
        (f"{TURN}.question", 5),
        (f"{TURN}.answer", None),
        (f"{TURN}.answer", "\ud800"),
        (f"{TURN}.documents", [["name", "text"]]),
        (f"{TURN}.pictures", [{"name": "a", "sha256": "none.npy"}]),
        (f"{TURN}.pictures", [{"name": "a"}]),
        (f"{TURN}.documents", [{"name": "a", "text": 1}]),
    ],
)
def test_every_field_of_a_session_has_a_type_and_a_range(talk, sessions, place, value):
    model, path = talk
    if place == TURN:
        rewritten(path, fields={"conversation.turns": [value]})
    else:
        rewritten(path, fields={place: value})
    n_tokens = model.engine.cache.n_tokens
    with pytest.raises(PopError, match="damaged or is not a session file"):
        sessions.load("talk", model.engine)
    assert model.engine.cache.n_tokens == n_tokens
    (stored,) = sessions.listed()
    assert stored.session is None


def npy(head: str, data: bytes = b"") -> bytes:
    padded = head.ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(padded).to_bytes(2, "little") + padded.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (999999999999,), }"),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (N,), }"),
        npy("{'descr': '<U999999999', 'fortran_order': False, 'shape': (N,), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (N,), }", bytes(4000)),
        npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (N,), }"),
        npy("(" * 100),
        npy("{'descr': '<i4', 'fortran_order': False, 'shape': (N,), }"),
        b"",
    ],
)
@pytest.mark.parametrize("name", ["tokens_npy", "full_npy"])
def test_arrays_of_another_type_or_size_are_rejected(talk, sessions, name, content):
    model, path = talk
    rewritten(path, **{name: content.replace(b"N", str(model.engine.cache.n_tokens).encode())})
    with pytest.raises(PopError, match="damaged or is not a session file"):
        sessions.load("talk", model.engine)


def test_tokens_outside_the_vocabulary_are_rejected(talk, sessions):
    model, path = talk
    for token in (-2, model.engine.context.vocabulary.n_tokens):
        tokens = encoded_array(np.full(model.engine.cache.n_tokens, token, np.int32))
        rewritten(path, tokens_npy=tokens)
        with pytest.raises(PopError, match="damaged or is not a session file"):
            sessions.load("talk", model.engine)


@pytest.mark.parametrize("kv", ["empty", "cut", "of fewer cells"])
def test_incomplete_kv_are_read_again(chat_model, sessions, kv):
    model = opened(chat_model)
    said = answered(model, QUESTION)
    sessions.save("talk", model.engine, said)
    expected = follow_up(opened(chat_model), said)
    state = model.engine.states.save().cells
    if kv == "of fewer cells":
        model.engine.cache.truncate(10)
        state = model.engine.states.save().cells
    content = {"empty": b"", "cut": state[:-1]}.get(kv, state)
    rewritten(sessions.path("talk"), kv_bin=content)
    restored = sessions.load("talk", model.engine)
    assert restored.reread == "the saved state does not match this model and context"
    assert model.engine.cache.n_tokens == 0
    assert follow_up(model, said) == expected


def test_a_compressed_session_is_refused(talk, sessions):
    model, path = talk
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("session.json", b" " * 1_000_000)
    with pytest.raises(PopError, match="damaged or is not a session file"):
        sessions.load("talk", model.engine)
