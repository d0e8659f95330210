"""Session files: a conversation as JSON, without its KV cache.

The model reads a loaded conversation like any other prompt, so it reuses the rows that the prompt
cache or the disk store holds. Format 3 was a zip archive that also contained the KV cache.
"""

import base64
import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pop_base.errors import PopError
from pop_base.output_file import make_private, replacing
from pop_local.engine.cache.saved_state import DAMAGES, read_member
from pop_local.engine.engine import Engine
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.texts.document_readers import Document

SUFFIX = ".popsession"
FORMAT = 4
_ARCHIVE_FORMAT = 3
_REREAD = "it was saved by an earlier version"
_NAME = re.compile(r"\w(?:[\w .+-]{0,78}[\w.+-])?")


@dataclass(frozen=True)
class Session:
    """The contents of a session file.

    `model`: the model's path. `mode`: None if the model could not be pruned. `reread`: why the
    file's KV cache cannot be used, or "" if the file contains no KV cache.
    """

    model: str
    mode: Mode | None
    conversation: Conversation
    reread: str = ""


@dataclass(frozen=True)
class SavedFile:
    """A session file. `session` is None if the file is unreadable."""

    name: str
    size_bytes: int
    changed_s: float
    session: Session | None


class Sessions:
    """A folder of saved sessions, which are accessed by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the sorted names of the session files."""
        paths = (path for path in self._folder.glob(f"*{SUFFIX}") if path.is_file())
        return sorted(filter(_NAME.fullmatch, (path.name.removesuffix(SUFFIX) for path in paths)))

    def listed(self) -> Iterator[SavedFile]:
        """Yield all sessions in name order."""
        for name in self.names():
            status, session = self.path(name).stat(), None
            with suppress(PopError):
                session = read_session(self.path(name))
            yield SavedFile(name, status.st_size, status.st_mtime, session)

    def path(self, name: str) -> Path:
        """Return a session's path. Raises PopError for an invalid name, such as a path."""
        if not _NAME.fullmatch(name):
            raise PopError(
                f"{name!r} is not a valid session name",
                "use up to 80 characters (letters, digits, spaces, _, +, -, or .)",
            )
        return self._folder / f"{name}{SUFFIX}"


def write_session(path: Path, engine: Engine, conversation: Conversation) -> None:
    """Write a session file atomically. Raises PopError on failure."""
    settings = engine.sequences[0].settings
    fields = {
        "format": FORMAT,
        "model": str(engine.context.files.path),
        "mode": settings.mode.name if settings.can_switch else None,
        **dataclasses.asdict(conversation),
    }
    text = json.dumps(fields, ensure_ascii=False, indent=1, default=_base64)
    try:
        make_private(path.parent)
    except OSError as error:
        hint = "check the folder's permissions"
        raise PopError(f"cannot create {path.parent}: {error.strerror}", hint) from error
    with replacing(path, force=True) as file:
        if hasattr(os, "fchmod"):  # conversations are private
            os.fchmod(file.fileno(), 0o600)
        file.write(text.encode(errors="replace"))  # file names may contain lone surrogates
        file.flush()
        os.fsync(file.fileno())  # the file is the conversation's only copy


def read_session(path: Path) -> Session:
    """Read a session file. Raises PopError if the file is unreadable or in an unknown format."""
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_archive(file)
            file.seek(0)
            return _session(json.load(file), FORMAT, lambda fields: _decoded(fields["content"]))
    except OSError as error:
        hint = "check the file's permissions"
        raise PopError(f"cannot read {path}: {error.strerror}", hint) from error
    except (AttributeError, TypeError, *DAMAGES) as error:
        raise PopError(
            f"the file {path} is damaged or is not a session file",
            "wait if the file is still being copied, or load a different file",
        ) from error


def _read_archive(file: BinaryIO) -> Session:
    with zipfile.ZipFile(file) as archive:
        raw = json.loads(read_member(archive, "session.json"))
        raw |= raw["conversation"]
        session = _session(
            raw,
            _ARCHIVE_FORMAT,
            lambda fields: read_member(archive, f"pictures/{_text(fields['sha256'])}"),
        )
        has_cache = "kv.bin" in archive.namelist()
    return dataclasses.replace(session, reread=_REREAD if has_cache else "")


def _session(raw: Any, version: int, read_image: Callable[[Any], bytes]) -> Session:
    """Parse a file's JSON. Raises one of DAMAGES, AttributeError, or TypeError if it is invalid."""
    if raw["format"] != version:
        raise PopError(
            f"the session uses format {raw['format']}, but this version reads only format {FORMAT}",
            "load the session with the version of pop-local that saved it",
        )
    turns = tuple(
        Turn(
            _text(turn["question"]),
            tuple(Document(_text(item["name"]), _text(item["text"])) for item in turn["documents"]),
            _text(turn["answer"]),
            tuple(picture_of(read_image(item), _text(item["name"])) for item in turn["pictures"]),
        )
        for turn in raw["turns"]
    )
    mode = None if raw["mode"] is None else Mode[raw["mode"]]
    return Session(_text(raw["model"]), mode, Conversation(_text(raw["system"]), turns))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    value.encode()  # raises for lone surrogates
    return value


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(content: str) -> bytes:
    return base64.b64decode(content, validate=True)
