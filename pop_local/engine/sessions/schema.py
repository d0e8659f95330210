"""The fields of a session file: each has a type and a range, checked before it is used."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation, Document, Turn

T = TypeVar("T")

FORMAT = 3
# The head of an array as numpy writes one of one dimension; numpy's own reader would allocate what
# a head asks for, and evaluates it.
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d{1,9}),\), }"
    rb" *\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Fingerprint:
    """The model and backend of saved K/V, besides the POP key."""

    model_bytes: int
    model_sha256: str
    backend: str
    mmproj: str = ""


class OtherFormatError(Exception):
    """A session of another version."""


@dataclass(frozen=True)
class Session:
    """A file but for the K/V; `mode` is the one that they were computed in.

    `images`: the key of each image by the row where it begins.
    """

    name: str
    model: str
    n_tokens: int
    mode: Mode
    key: str
    fingerprint: Fingerprint
    conversation: Conversation
    images: tuple[tuple[int, str], ...] = ()


def encoded(session: Session) -> str:
    """Return the session as JSON, its pictures by name and hash."""
    fields = dataclasses.asdict(session) | {"mode": session.mode.name, "format": FORMAT}
    for turn, raw in zip(session.conversation.turns, fields["conversation"]["turns"], strict=True):
        raw["pictures"] = [{"name": one.name, "sha256": one.sha256} for one in turn.pictures]
    return json.dumps(fields, ensure_ascii=False, indent=1)


# The picture of a name and a hash.
ReadPicture = Callable[[str, str], Picture]


def decoded(content: bytes, picture: ReadPicture) -> Session:
    """Return the session in JSON.

    Raises OtherFormatError, and ValueError or RecursionError for what is none.
    """
    raw = _typed(json.loads(content), dict)
    if (found := _typed(raw.get("format"), int)) != FORMAT:
        raise OtherFormatError(f"it is of format {found}, this version reads format {FORMAT}")
    fields = _object(raw, Session, "format")
    fingerprint = _object(fields["fingerprint"], Fingerprint)
    conversation = _object(fields["conversation"], Conversation)
    if _text(fields["mode"]) not in Mode.__members__:
        raise ValueError("another mode")
    return Session(
        name=_text(fields["name"]),
        model=_text(fields["model"]),
        n_tokens=_number(fields["n_tokens"], 2**31 - 1),
        mode=Mode[fields["mode"]],
        key=_text(fields["key"]),
        fingerprint=Fingerprint(
            _number(fingerprint["model_bytes"], 2**63 - 1),
            _text(fingerprint["model_sha256"]),
            _text(fingerprint["backend"]),
            _text(fingerprint["mmproj"]),
        ),
        conversation=Conversation(
            _text(conversation["system"]),
            tuple(_turn(turn, picture) for turn in _typed(conversation["turns"], list)),
        ),
        images=tuple(_image(each) for each in _typed(fields["images"], list)),
    )


def encoded_array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def decoded_array(content: bytes, kind: type[np.generic], length: int) -> np.ndarray:
    """Return the array of a .npy file. Raises ValueError for another type, length or size."""
    head, dtype = _NPY.match(content), np.dtype(kind)
    if (
        head is None
        or head[1].decode() != dtype.str
        or int(head[2]) != length
        or len(content) != head.end() + length * dtype.itemsize
    ):
        raise ValueError("another array")
    return np.frombuffer(content, dtype, offset=head.end())


def _image(value: object) -> tuple[int, str]:
    start, key = _typed(value, list)
    return _number(start, 2**31 - 1), _text(key)


def _turn(value: object, picture: ReadPicture) -> Turn:
    turn = _object(value, Turn)
    pictures = [_fields(each, {"name", "sha256"}) for each in _typed(turn["pictures"], list)]
    documents = [_object(each, Document) for each in _typed(turn["documents"], list)]
    return Turn(
        _text(turn["question"]),
        tuple(Document(_text(each["name"]), _text(each["text"])) for each in documents),
        _text(turn["answer"]),
        tuple(picture(_text(each["name"]), _text(each["sha256"])) for each in pictures),
    )


def _object(value: object, kind: type[Any], *more: str) -> dict[str, Any]:
    """The fields of a dataclass, these alone and all of them."""
    return _fields(value, {*(field.name for field in dataclasses.fields(kind)), *more})


def _fields(value: object, names: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(value, dict)
    if fields.keys() != names:
        raise ValueError("other fields")
    return fields


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} for a {kind.__name__}")
    return value


def _number(value: object, most: int) -> int:
    number = _typed(value, int)
    if not 0 <= number <= most:
        raise ValueError("a number out of its range")
    return number


def _text(value: object) -> str:
    text = _typed(value, str)
    text.encode()  # JSON can spell halves of surrogates, which are no text
    return text
