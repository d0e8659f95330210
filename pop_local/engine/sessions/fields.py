"""The fields of a session file, and checks of their types and ranges."""

import dataclasses
import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pop_local.engine.images.pictures import Picture
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation

T = TypeVar("T")

FORMAT = 3


@dataclass(frozen=True)
class Fingerprint:
    """Identity of the model and backend that computed the K/V, without the POP key."""

    model_bytes: int
    model_sha256: str
    backend: str
    mmproj: str = ""


class OtherFormatError(Exception):
    """A session of another format version."""


@dataclass(frozen=True)
class Session:
    """A session file without its K/V.

    `mode`: the mode that computed the K/V. `images`: (first row, key) of each image.
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
    """Return the session as JSON, with names and hashes instead of pictures."""
    fields = dataclasses.asdict(session) | {"mode": session.mode.name, "format": FORMAT}
    for turn, raw in zip(session.conversation.turns, fields["conversation"]["turns"], strict=True):
        raw["pictures"] = [{"name": one.name, "sha256": one.sha256} for one in turn.pictures]
    return json.dumps(fields, ensure_ascii=False, indent=1)


# Returns the picture with this name and hash.
ReadPicture = Callable[[str, str], Picture]


def decoded(content: bytes, picture: ReadPicture) -> Session:
    """Parse a session's JSON.

    Raises OtherFormatError for another version, ValueError or RecursionError for invalid JSON.
    """
    raw = _typed(json.loads(content), dict)
    if (found := _typed(raw.pop("format", None), int)) != FORMAT:
        raise OtherFormatError(f"the file has format {found}, this version reads format {FORMAT}")
    session: Session = _value(Session, raw, picture)
    return session


def _value(kind: Any, raw: object, picture: ReadPicture) -> Any:
    """Convert a field's JSON to its type. Raises ValueError for missing or unknown fields."""
    if kind is Picture:
        named = _fields(raw, {"name", "sha256"})
        return picture(_text(named["name"]), _text(named["sha256"]))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        fields = _fields(raw, hints.keys())
        return kind(**{name: _value(hint, fields[name], picture) for name, hint in hints.items()})
    if get_origin(kind) is tuple:
        items, kinds = _typed(raw, list), get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(items)
        return tuple(_value(of, item, picture) for of, item in zip(kinds, items, strict=True))
    if kind is Mode:
        if (name := _text(raw)) not in Mode.__members__:
            raise ValueError("unknown mode")
        return Mode[name]
    if kind is not int:
        return _text(raw)
    if not 0 <= (number := _typed(raw, int)) < 2**63:
        raise ValueError("number out of range")
    return number


def _fields(value: object, names: Set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(value, dict)
    if fields.keys() != names:
        raise ValueError("missing or unknown fields")
    return fields


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _text(value: object) -> str:
    text = _typed(value, str)
    text.encode()  # raises for lone surrogates
    return text
