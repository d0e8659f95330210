"""Saved conversations: the transcript and the KV state, in one zip file each.

    session.json   format, model, backend, KV key and the transcript
    tokens.npy     int32 (n_tokens): the token of each cached row, NO_TOKEN for those of images
    full.npy       bool (n_tokens): whether its row ran all layers
    positions.npy  int32 (n_tokens + 1): where it stands, and where the next one will
    pictures/HASH  the files of pictures, by SHA-256
    kv.bin         llama.cpp's state: the cells in use, not the whole context

Where the model has another conversation cached, n_tokens is 0 and there is session.json alone.

The K/V are used again only by the same model and mmproj (size and hash of headers and tensors'
beginnings), POP mode, boundary and projections (KvCache.key), backend version and RoPE options;
otherwise the transcript alone is. zip's CRC-32 tells a damaged file.
"""

import dataclasses
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pop_converter.base.errors import PopError
from pop_converter.base.output_file import make_private, replacing
from pop_converter.gguf.source import sampled_sha256
from pop_local.engine.cache.keys import opened_with
from pop_local.engine.cache.kv_cache import KvCache
from pop_local.engine.cache.prompt_cache import SavedState
from pop_local.engine.engine import Engine
from pop_local.engine.images.mmproj import NO_TOKEN
from pop_local.engine.images.pictures import Picture, picture_of
from pop_local.engine.llama import backend
from pop_local.engine.llama.backend import Mode
from pop_local.engine.llama.pieces import Pieces
from pop_local.engine.sessions.conversation import Conversation
from pop_local.engine.sessions.fields import (
    Fingerprint,
    OtherFormatError,
    Session,
    decoded,
    decoded_array,
    encoded,
    encoded_array,
)

SUFFIX = ".popsession"
_NOT_SAVED = "they had made room for another conversation when it was saved"
_TRANSCRIPT = "session.json"
_PICTURE = "pictures/{}"
_MAX_TRANSCRIPT_BYTES = 1 << 28
_NAME = re.compile(r"\w[\w .+-]{0,79}")
# Errors of zipfile and the schema; RuntimeError for encrypted archives and deeply nested JSON.
_DAMAGES = (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError)

# The picture of a name and a hash in a file.
ReadFrom = Callable[[zipfile.ZipFile, str, str], Picture]


@dataclass(frozen=True)
class SavedFile:
    """A file in the folder; `session` is None when it cannot be read."""

    name: str
    size_bytes: int
    changed_s: float
    session: Session | None


@dataclass(frozen=True)
class Restored:
    """A session after loading; `reread` says why its K/V were not used, or is empty."""

    session: Session
    reread: str


def n_own_tokens(engine: Engine, conversation: Conversation) -> int:
    """How many cached tokens, from the first on, are the conversation's.

    They are the prompt of its last question, whole, and what is cached of the answer; otherwise 0.
    The answer is compared as text: as a message its tokens may be others than were sampled.
    """
    if not conversation.turns:
        return 0
    last = conversation.turns[-1]
    asked = conversation.without_last().plus(dataclasses.replace(last, answer=""))
    try:
        prompt = engine.prompter.conversation(asked.messages)
    except PopError:  # of another model's template, so nothing of it is cached
        return 0
    n_own = len(prompt)
    if engine.cache.n_same(prompt) < n_own:
        return 0
    pieces = Pieces(engine.context)
    said = last.answer.removeprefix(prompt.begun).encode()
    at = 0
    for token in engine.cache.tokens[n_own:].tolist():
        if token == NO_TOKEN:  # of a picture that was shown later
            break
        piece = pieces[token]
        if not said.startswith(piece, at):
            break
        at += len(piece)
        n_own += 1
    return n_own


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name == name.strip()


def fingerprint(engine: Engine) -> Fingerprint:
    """Read the beginnings of the model's tensors; where a file was replaced there is no hash."""
    source = engine.context.source
    version = f"{backend.version()} abi {backend.library_abi()}{opened_with(engine.context)}"
    mmproj = engine.vision.key if engine.vision else ""
    sha256 = "" if engine.context.replaced else sampled_sha256(source)
    return Fingerprint(source.size_bytes, sha256, version, mmproj)


class Sessions:
    """The saved sessions in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return the names that `load` takes; links to nowhere, pipes and folders are no files."""
        found = (path for path in self._folder.glob(f"*{SUFFIX}") if path.is_file())
        names = (path.name.removesuffix(SUFFIX) for path in found)
        return sorted(filter(_is_name, names))

    def listed(self) -> Iterator[SavedFile]:
        for name in self.names():
            status = self.path(name).stat()
            try:
                with _opened(self._file(name)) as archive:
                    session = _session(archive, _named_picture)
            except PopError:
                session = None
            yield SavedFile(name, status.st_size, status.st_mtime, session)

    def path(self, name: str) -> Path:
        """Give the file of a name. Raises PopError for what is no name, such as a path."""
        if not _is_name(name):
            raise PopError(
                f"{name!r} cannot name a session",
                "take letters, digits, blanks and any of . _ + - (at most 80)",
            )
        return self._folder / f"{name}{SUFFIX}"

    def save(self, name: str, engine: Engine, conversation: Conversation) -> int:
        """Write the file beside and rename it; returns its size in bytes. Raises PopError.

        Where the conversation's K/V are cached, what is cached after them is forgotten.
        """
        return self._write(name, engine, conversation, _own_state(engine, conversation))

    def save_transcript(self, name: str, engine: Engine, conversation: Conversation) -> int:
        """As `save`, without the K/V: quick, small, and nothing that is cached is forgotten."""
        return self._write(name, engine, conversation, None)

    def _write(
        self, name: str, engine: Engine, conversation: Conversation, state: SavedState | None
    ) -> int:
        path = self.path(name)
        n_tokens = 0 if state is None else state.n_tokens
        session = Session(
            name=name,
            model=str(engine.context.path),
            n_tokens=n_tokens,
            mode=engine.cache.mode,
            key=engine.cache.key,
            fingerprint=fingerprint(engine),
            conversation=conversation,
            images=tuple(state.images.items()) if state else (),
        )
        try:
            make_private(self._folder)
        except OSError as error:
            raise PopError(f"cannot make {self._folder}: {error.strerror}") from error
        with replacing(path, force=True) as file:
            if hasattr(os, "fchmod"):  # what was said is nobody else's business
                os.fchmod(file.fileno(), 0o600)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # The name of a file may be no text.
                _add(archive, _TRANSCRIPT, encoded(session).encode(errors="replace"))
                for picture in conversation.pictures:
                    _add(archive, _PICTURE.format(picture.sha256), picture.content)
                if state is not None:
                    _add(archive, "positions.npy", encoded_array(state.positions))
                    _add(archive, "tokens.npy", encoded_array(state.tokens))
                    _add(archive, "full.npy", encoded_array(state.is_full))
                    _add(archive, "kv.bin", state.cells)
            file.flush()
            os.fsync(file.fileno())  # nothing else holds what was said
        return path.stat().st_size

    def load(self, name: str, engine: Engine) -> Restored:
        """The model takes over mode and K/V where they fit. Raises PopError, nothing changed."""
        path = self._file(name)
        ours, state = fingerprint(engine), None
        with _opened(path) as archive:  # once: another process may replace the file meanwhile
            session = _session(archive, _stored_picture)
            reread = _difference(session, ours, engine)
            if session.n_tokens and not reread:
                state = _state(archive, session, engine.cache)
        if reread:
            return Restored(session, reread)
        if state is None:
            engine.set_mode(session.mode)
            return Restored(session, _NOT_SAVED if session.conversation.turns else "")
        if not _is_consistent(state, engine.context.n_vocab):
            raise _damaged(path)
        engine.set_mode(session.mode)
        if not engine.cache.accepts(session.key):
            return Restored(session, f"they belong to {session.key}")
        try:
            engine.cache.take_over(state)
        except PopError as error:
            return Restored(session, error.message)
        return Restored(session, "")

    def _file(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            raise PopError(f"there is no session {name}", "check the name")
        return path


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a member without the time, which the clock may have outside of what zip knows."""
    archive.writestr(zipfile.ZipInfo(name), content)


def _session(archive: zipfile.ZipFile, picture: ReadFrom) -> Session:
    return decoded(_member(archive, _TRANSCRIPT), partial(picture, archive))


def _stored_picture(archive: zipfile.ZipFile, name: str, sha256: str) -> Picture:
    found = picture_of(_member(archive, _PICTURE.format(sha256)), name)
    if found.sha256 != sha256:
        raise ValueError("another picture")
    return found


def _named_picture(archive: zipfile.ZipFile, name: str, sha256: str) -> Picture:
    """For a list of sessions, which shows none."""
    archive.getinfo(_PICTURE.format(sha256))
    return Picture(name, b"", 0, 0)


def _state(archive: zipfile.ZipFile, session: Session, cache: KvCache) -> SavedState:
    """Read the saved KV cache. Raises ValueError for arrays of other lengths."""
    n = session.n_tokens
    return SavedState(
        key=session.key,
        model=cache.model_key,
        tokens=decoded_array(_member(archive, "tokens.npy"), np.int32, n),
        is_full=decoded_array(_member(archive, "full.npy"), np.bool_, n),
        positions=decoded_array(_member(archive, "positions.npy"), np.int32, n + 1),
        cells=_member(archive, "kv.bin"),
        images=dict(session.images),
    )


def _is_consistent(state: SavedState, n_vocab: int) -> bool:
    """Whether tokens are in the vocabulary or of images, and positions ascend."""
    is_text = state.tokens != NO_TOKEN
    begins = np.flatnonzero(~is_text & np.r_[True, is_text[:-1]])
    steps = np.diff(state.positions)
    return bool(
        state.tokens.max() < n_vocab
        and state.tokens.min() >= NO_TOKEN
        and set(begins.tolist()) <= state.images.keys()
        and not is_text[[start for start in state.images if start < len(is_text)]].any()
        and state.positions[0] == 0
        and (steps >= 0).all()
        and (steps[is_text] == 1).all()
    )


def _own_state(engine: Engine, conversation: Conversation) -> SavedState | None:
    """None where the conversation's K/V are not cached."""
    n_own = n_own_tokens(engine, conversation)
    return engine.cache.save() if n_own and engine.cache.truncate(n_own) else None


def _difference(session: Session, ours: Fingerprint, engine: Engine) -> str:
    """Say why the model cannot use the K/V, nothing where it can."""
    saved = session.fingerprint
    if (saved.model_bytes, saved.model_sha256) != (ours.model_bytes, ours.model_sha256):
        return f"they belong to another model ({session.model})"
    if saved.mmproj != ours.mmproj and session.conversation.pictures:
        return "they belong to another mmproj, or to none"
    if saved.backend != ours.backend:
        return f"they were computed by backend {saved.backend}, this is {ours.backend}"
    if session.mode is not Mode.OFF and not engine.cache.can_switch:
        return "they are pruned, which this model is not converted for"
    if session.n_tokens > engine.context.n_ctx:
        return f"they need a context of {session.n_tokens} tokens"
    return ""


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member as it is stored: one that is packed could be of any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is packed")
    if name == _TRANSCRIPT and info.file_size > _MAX_TRANSCRIPT_BYTES:
        raise ValueError(f"{name} is longer than any conversation")
    return archive.read(info)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise PopError(f"cannot read {path}: {error.strerror}") from error
    except OtherFormatError as error:
        raise PopError(f"the session {path} cannot be read: {error}") from error
    except _DAMAGES as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> PopError:
    return PopError(
        f"the session {path} is damaged or not a session",
        "try again if it is being copied, else save under another name",
    )
