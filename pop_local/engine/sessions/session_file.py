"""Session files: a conversation's transcript and KV state in a zip file.

    session.json   format, model, backend, KV key, and the transcript
    pictures/HASH  image files by SHA-256
    *.npy, kv.bin  the KV cache, see cache/saved_state.py

If the model's cache holds a different conversation, n_tokens is 0 and the arrays are missing.

Loading restores the K/V only if the model, mmproj, POP mode, boundary, projections, backend
version, and RoPE options are unchanged. Loading always restores the transcript. Models are compared
by size and by a hash of their headers and sampled tensor data. The zip file's CRC-32 checksums
detect damage.
"""

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pop_converter.base.errors import PopError
from pop_converter.base.output_file import make_private, replacing
from pop_converter.gguf.source import sampled_sha256
from pop_local.engine.cache.cache_keys import opened_with
from pop_local.engine.cache.saved_state import DAMAGES, add_member, members, read_member, read_state
from pop_local.engine.engine import Engine
from pop_local.engine.images.mmproj import NO_TOKEN
from pop_local.engine.images.pictures import Picture, picture_of
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.vocabulary import Pieces
from pop_local.engine.sessions.conversation import Conversation

SUFFIX = ".popsession"
FORMAT = 3
_NOT_SAVED = "another conversation replaced the cached rows before the session was saved"
_TRANSCRIPT = "session.json"
_PICTURE = "pictures/{}"
_MAX_TRANSCRIPT_BYTES = 1 << 28
_NAME = re.compile(r"\w(?:[\w .+-]{0,78}[\w.+-])?")

T = TypeVar("T")

# A function that returns the picture with a given name and hash.
ReadPicture = Callable[[str, str], Picture]


@dataclass(frozen=True)
class Fingerprint:
    """The model and backend that computed the K/V. `Session.key` contains the POP settings."""

    model_bytes: int
    model_sha256: str
    backend: str
    mmproj: str = ""


@dataclass(frozen=True)
class Session:
    """The contents of a session file, except for the K/V.

    `mode`: the mode in which the K/V were computed. `images`: the first row and key of each image.
    """

    name: str
    model: str
    n_tokens: int
    mode: Mode
    key: str
    fingerprint: Fingerprint
    conversation: Conversation
    images: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class SavedFile:
    """A session file. `session` is None if the file is unreadable."""

    name: str
    size_bytes: int
    changed_s: float
    session: Session | None


@dataclass(frozen=True)
class Restored:
    """A loaded session. `reread`: why the saved K/V cannot be used, or ""."""

    session: Session
    reread: str


def n_own_tokens(engine: Engine, conversation: Conversation) -> int:
    """Count the leading cached tokens that belong to the conversation.

    The count includes the last question's prompt and the cached part of the answer. The count is 0
    if any part of the prompt is not cached. Answers are compared as text, because tokenizing an
    answer may not reproduce the sampled tokens.
    """
    if not conversation.turns:
        return 0
    last = conversation.turns[-1]
    asked = conversation.without_last().plus(dataclasses.replace(last, answer=""))
    try:
        prompt = engine.prompter.conversation(asked.messages)
    except PopError:  # the template rejects the prompt, so the prompt is not cached
        return 0
    n_own = len(prompt)
    if engine.states.n_same(prompt) < n_own:
        return 0
    pieces = Pieces(engine.context.vocabulary)
    said = last.answer.removeprefix(prompt.begun).encode()
    at = 0
    for token in engine.cache.tokens[n_own:].tolist():
        if token == NO_TOKEN:  # a later turn's picture
            break
        piece = pieces[token]
        if not said.startswith(piece, at):
            break
        at += len(piece)
        n_own += 1
    return n_own


def fingerprint(engine: Engine) -> Fingerprint:
    """Return the fingerprint. The hash is empty if a model file was replaced while it was open."""
    source = engine.context.files.source
    version = f"{backend.version()} abi {backend.library_abi()}{opened_with(engine.context)}"
    mmproj = engine.vision.key if engine.vision else ""
    sha256 = "" if engine.context.files.replaced else sampled_sha256(source)
    return Fingerprint(source.size_bytes, sha256, version, mmproj)


class Sessions:
    """A folder of saved sessions, which are accessed by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the sorted names of the sessions that `load` accepts."""
        found = (path for path in self._folder.glob(f"*{SUFFIX}") if path.is_file())
        names = (path.name.removesuffix(SUFFIX) for path in found)
        return sorted(filter(_NAME.fullmatch, names))

    def listed(self) -> Iterator[SavedFile]:
        """Yield all sessions in name order, without image contents."""
        for name in self.names():
            status = self.path(name).stat()
            session = None
            with suppress(PopError), _opened(self.path(name)) as archive:
                session = _session(archive, with_pictures=False)
            yield SavedFile(name, status.st_size, status.st_mtime, session)

    def path(self, name: str) -> Path:
        """Return a session's path. Raises PopError for an invalid name, such as a path."""
        if not _NAME.fullmatch(name):
            raise PopError(
                f"{name!r} is not a valid session name",
                "use up to 80 characters (letters, digits, spaces, _, +, -, or .)",
            )
        return self._folder / f"{name}{SUFFIX}"

    def save(
        self, name: str, engine: Engine, conversation: Conversation, *, with_cache: bool = True
    ) -> int:
        """Write the file atomically and return its size in bytes. Raises PopError on failure.

        `with_cache`: whether to also save the cached rows that belong to the conversation. If rows
        are saved, all rows after them are dropped from the cache.
        """
        path, state = self.path(name), None
        n_own = n_own_tokens(engine, conversation) if with_cache else 0
        if n_own and engine.cache.truncate(n_own):
            state = engine.states.save()
        session = Session(
            name=name,
            model=str(engine.context.files.path),
            n_tokens=state.n_tokens if state else 0,
            mode=engine.pruning.mode,
            key=engine.states.key,
            fingerprint=fingerprint(engine),
            conversation=conversation,
            images=tuple(state.images.items()) if state else (),
        )
        try:
            make_private(self._folder)
        except OSError as error:
            hint = "check the folder's permissions"
            raise PopError(f"cannot create {self._folder}: {error.strerror}", hint) from error
        with replacing(path, force=True) as file:
            if hasattr(os, "fchmod"):  # conversations are private
                os.fchmod(file.fileno(), 0o600)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # File names may contain lone surrogates.
                add_member(archive, _TRANSCRIPT, encoded(session).encode(errors="replace"))
                for picture in conversation.pictures:
                    add_member(archive, _PICTURE.format(picture.sha256), picture.content)
                for name, content in members(state) if state is not None else ():
                    add_member(archive, name, content)
            file.flush()
            os.fsync(file.fileno())  # the file is the conversation's only copy
        return path.stat().st_size

    def load(self, name: str, engine: Engine) -> Restored:
        """Load a session, including its mode and K/V if they match the model.

        If the file is missing or damaged, raises PopError and leaves the model unchanged.
        """
        path = self.path(name)
        ours, state = fingerprint(engine), None
        with _opened(path) as archive:  # opened once, because another process may replace the file
            session = _session(archive)
            reread = _difference(session, ours, engine)
            if session.n_tokens and not reread:
                state = read_state(
                    archive,
                    session.key,
                    engine.states.keys.model,
                    dict(session.images),
                    session.n_tokens,
                )
        if reread:
            return Restored(session, reread)
        if state is not None and state.tokens.max() >= engine.context.vocabulary.n_tokens:
            raise _damaged(path)
        engine.set_mode(session.mode)
        if state is None:
            return Restored(session, _NOT_SAVED if session.conversation.turns else "")
        try:
            engine.states.restore(state)
        except PopError as error:
            return Restored(session, error.message)
        return Restored(session, "")


def encoded(session: Session) -> str:
    """Return the session as JSON, with each image replaced by its name and hash."""
    fields = dataclasses.asdict(session) | {"mode": session.mode.name, "format": FORMAT}
    for turn, raw in zip(session.conversation.turns, fields["conversation"]["turns"], strict=True):
        raw["pictures"] = [{"name": one.name, "sha256": one.sha256} for one in turn.pictures]
    return json.dumps(fields, ensure_ascii=False, indent=1)


def _session(archive: zipfile.ZipFile, *, with_pictures: bool = True) -> Session:
    """Parse an archive's transcript. Image contents are omitted unless `with_pictures` is True.

    Raises PopError if the format version is unsupported, or one of DAMAGES if the JSON is invalid.
    """

    def picture(name: str, sha256: str) -> Picture:
        member = _PICTURE.format(sha256)
        if not with_pictures:
            archive.getinfo(member)  # raises if the picture is missing
            return Picture(name, b"", 0, 0)
        found = picture_of(read_member(archive, member), name)
        if found.sha256 != sha256:
            raise ValueError("the image's hash does not match")
        return found

    raw = _typed(json.loads(read_member(archive, _TRANSCRIPT, _MAX_TRANSCRIPT_BYTES)), dict)
    if (found := _typed(raw.pop("format", None), int)) != FORMAT:
        raise PopError(
            f"the session {archive.filename} cannot be read: the file uses format {found}, but this"
            f" version reads only format {FORMAT}",
            "load the session with the version of pop-local that saved it",
        )
    session: Session = _value(Session, raw, picture)
    return session


def _value(kind: Any, raw: object, picture: ReadPicture) -> Any:
    """Convert a field's JSON to the field's type. Raises ValueError or KeyError on failure."""
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
        return Mode[_text(raw)]
    if kind is not int:
        return _text(raw)
    if not 0 <= (number := _typed(raw, int)) < 2**63:
        raise ValueError("the number is out of range")
    return number


def _fields(value: object, names: Set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(value, dict)
    if fields.keys() != names:
        raise ValueError("some fields are missing or unknown")
    return fields


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _text(value: object) -> str:
    text = _typed(value, str)
    text.encode()  # raises for lone surrogates
    return text


def _difference(session: Session, ours: Fingerprint, engine: Engine) -> str:
    """Return the reason why the model cannot use the saved KV cache ("" if it can)."""
    saved = session.fingerprint
    if (saved.model_bytes, saved.model_sha256) != (ours.model_bytes, ours.model_sha256):
        return f"the session was saved with a different model ({session.model})"
    if saved.mmproj != ours.mmproj and session.conversation.pictures:
        return "the session was saved with a different mmproj"
    if saved.backend != ours.backend:
        was, now = saved.backend, ours.backend
        return f"the session was saved with backend {was}, but the current backend is {now}"
    if session.mode is not Mode.OFF and not engine.pruning.can_switch:
        return "the session was saved while pruning was on, but this model has not been converted"
    if session.n_tokens > engine.context.n_ctx:
        return f"the session needs a context of {session.n_tokens:,} tokens"
    return ""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        hint = "check the file's permissions"
        raise PopError(f"cannot read {path}: {error.strerror}", hint) from error
    except DAMAGES as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> PopError:
    return PopError(
        f"the file {path} is damaged or is not a session file",
        "wait if the file is still being copied, or load a different file",
    )
