"""Session files: a conversation's transcript and KV state in a zip file.

    session.json   format, model, backend, KV key and the transcript
    tokens.npy     int32 (n_tokens): each cached row's token, NO_TOKEN for image rows
    full.npy       bool (n_tokens): rows that ran all layers
    positions.npy  int32 (n_tokens + 1): each row's position, and the next row's
    pictures/HASH  image files by SHA-256
    kv.bin         llama.cpp's state: only the used cells

If the model has cached another conversation, n_tokens is 0 and the arrays are missing.

Loading restores the K/V only for the same model and mmproj (size, and a hash of headers and samples
of the tensors), POP mode, boundary and projections (CacheStates.key), backend version and RoPE
options. Otherwise it restores the transcript alone. zip's CRC-32 detects damage.
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
from pop_local.engine.cache.cache_keys import CacheKeys, opened_with
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
_NOT_SAVED = "another conversation had replaced them when it was saved"
_TRANSCRIPT = "session.json"
_PICTURE = "pictures/{}"
_MAX_TRANSCRIPT_BYTES = 1 << 28
_NAME = re.compile(r"\w[\w .+-]{0,79}")
# zipfile and the schema raise these; RuntimeError: encrypted archives and deeply nested JSON.
_DAMAGES = (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError)

# Returns an archive's picture by its name and hash.
ReadFrom = Callable[[zipfile.ZipFile, str, str], Picture]


@dataclass(frozen=True)
class SavedFile:
    """A file in the folder; `session` is None if it is unreadable."""

    name: str
    size_bytes: int
    changed_s: float
    session: Session | None


@dataclass(frozen=True)
class Restored:
    """A loaded session; `reread`: the reason for not using its K/V, or ""."""

    session: Session
    reread: str


def n_own_tokens(engine: Engine, conversation: Conversation) -> int:
    """Count the leading cached tokens that belong to the conversation.

    They are the last question's whole prompt and the cached part of its answer, otherwise 0. The
    answer is compared as text, because tokenizing it may not return the sampled tokens.
    """
    if not conversation.turns:
        return 0
    last = conversation.turns[-1]
    asked = conversation.without_last().plus(dataclasses.replace(last, answer=""))
    try:
        prompt = engine.prompter.conversation(asked.messages)
    except PopError:  # only another model's template accepts it, so its rows are not cached
        return 0
    n_own = len(prompt)
    if engine.states.n_same(prompt) < n_own:
        return 0
    pieces = Pieces(engine.context)
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


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name == name.strip()


def fingerprint(engine: Engine) -> Fingerprint:
    """Hash samples of the model's tensors (no hash if a file was replaced while open)."""
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
        """Return the names that `load` accepts, without broken links, pipes and folders."""
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
        """Return a session's path. Raises PopError for an invalid name, such as a path."""
        if not _is_name(name):
            raise PopError(
                f"{name!r} cannot name a session",
                "use up to 80 letters, digits, spaces and any of . _ + -",
            )
        return self._folder / f"{name}{SUFFIX}"

    def save(self, name: str, engine: Engine, conversation: Conversation) -> int:
        """Write the file atomically; return its size in bytes. Raises PopError.

        If the conversation's K/V are cached, cached rows after them are dropped.
        """
        return self._write(name, engine, conversation, _own_state(engine, conversation))

    def save_transcript(self, name: str, engine: Engine, conversation: Conversation) -> int:
        """Save without the K/V, which is fast and small and leaves the cache unchanged."""
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
            mode=engine.pruning.mode,
            key=engine.states.key,
            fingerprint=fingerprint(engine),
            conversation=conversation,
            images=tuple(state.images.items()) if state else (),
        )
        try:
            make_private(self._folder)
        except OSError as error:
            raise PopError(
                f"cannot create {self._folder}: {error.strerror}", "check its permissions"
            ) from error
        with replacing(path, force=True) as file:
            if hasattr(os, "fchmod"):  # conversations are private
                os.fchmod(file.fileno(), 0o600)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # File names may contain lone surrogates.
                _add(archive, _TRANSCRIPT, encoded(session).encode(errors="replace"))
                for picture in conversation.pictures:
                    _add(archive, _PICTURE.format(picture.sha256), picture.content)
                if state is not None:
                    _add(archive, "positions.npy", encoded_array(state.positions))
                    _add(archive, "tokens.npy", encoded_array(state.tokens))
                    _add(archive, "full.npy", encoded_array(state.is_full))
                    _add(archive, "kv.bin", state.cells)
            file.flush()
            os.fsync(file.fileno())  # this is the only copy
        return path.stat().st_size

    def load(self, name: str, engine: Engine) -> Restored:
        """Load a session, with its mode and K/V if they fit.

        Raises PopError, and leaves the model unchanged then.
        """
        path = self._file(name)
        ours, state = fingerprint(engine), None
        with _opened(path) as archive:  # open once, since another process may replace the file
            session = _session(archive, _stored_picture)
            reread = _difference(session, ours, engine)
            if session.n_tokens and not reread:
                state = _state(archive, session, engine.states.keys)
        if reread:
            return Restored(session, reread)
        if state is None:
            engine.set_mode(session.mode)
            return Restored(session, _NOT_SAVED if session.conversation.turns else "")
        if not _is_consistent(state, engine.context.n_vocab):
            raise _damaged(path)
        engine.set_mode(session.mode)
        if not engine.states.keys.accepts(session.key):
            return Restored(session, f"they belong to {session.key}")
        try:
            engine.cache.load(state)
        except PopError as error:
            return Restored(session, error.message)
        return Restored(session, "")

    def _file(self, name: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            raise PopError(f"no session {name}", "check the name")
        return path


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a member without a timestamp, since zip cannot represent every clock value."""
    archive.writestr(zipfile.ZipInfo(name), content)


def _session(archive: zipfile.ZipFile, picture: ReadFrom) -> Session:
    return decoded(_member(archive, _TRANSCRIPT), partial(picture, archive))


def _stored_picture(archive: zipfile.ZipFile, name: str, sha256: str) -> Picture:
    found = picture_of(_member(archive, _PICTURE.format(sha256)), name)
    if found.sha256 != sha256:
        raise ValueError("another picture")
    return found


def _named_picture(archive: zipfile.ZipFile, name: str, sha256: str) -> Picture:
    """Return a picture without content, which suffices for listing sessions."""
    archive.getinfo(_PICTURE.format(sha256))
    return Picture(name, b"", 0, 0)


def _state(archive: zipfile.ZipFile, session: Session, keys: CacheKeys) -> SavedState:
    """Read the saved KV cache. Raises ValueError for arrays of other lengths."""
    n = session.n_tokens
    return SavedState(
        key=session.key,
        model=keys.model,
        tokens=decoded_array(_member(archive, "tokens.npy"), np.int32, n),
        is_full=decoded_array(_member(archive, "full.npy"), np.bool_, n),
        positions=decoded_array(_member(archive, "positions.npy"), np.int32, n + 1),
        cells=_member(archive, "kv.bin"),
        images=dict(session.images),
    )


def _is_consistent(state: SavedState, n_vocab: int) -> bool:
    """Return True if all tokens are valid or image rows, and positions ascend."""
    is_text = state.tokens != NO_TOKEN
    image_starts = np.flatnonzero(~is_text & np.r_[True, is_text[:-1]])
    steps = np.diff(state.positions)
    return bool(
        state.tokens.max() < n_vocab
        and state.tokens.min() >= NO_TOKEN
        and set(image_starts.tolist()) <= state.images.keys()
        and not is_text[[start for start in state.images if start < len(is_text)]].any()
        and state.positions[0] == 0
        and (steps >= 0).all()
        and (steps[is_text] == 1).all()
    )


def _own_state(engine: Engine, conversation: Conversation) -> SavedState | None:
    """Return the conversation's KV state, None if it is not cached."""
    n_own = n_own_tokens(engine, conversation)
    return engine.states.save() if n_own and engine.cache.truncate(n_own) else None


def _difference(session: Session, ours: Fingerprint, engine: Engine) -> str:
    """Return the reason why the model cannot use the K/V, or ""."""
    saved = session.fingerprint
    if (saved.model_bytes, saved.model_sha256) != (ours.model_bytes, ours.model_sha256):
        return f"they belong to another model ({session.model})"
    if saved.mmproj != ours.mmproj and session.conversation.pictures:
        return "they belong to another mmproj, or to none"
    if saved.backend != ours.backend:
        return f"they were computed by backend {saved.backend}, this is {ours.backend}"
    if session.mode is not Mode.OFF and not engine.pruning.can_switch:
        return "they are pruned, which this model is not converted for"
    if session.n_tokens > engine.context.n_ctx:
        return f"they need a context of {session.n_tokens} tokens"
    return ""


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a member. Reject compressed members, which could expand to any size."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
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
        "retry if it is still being copied, otherwise use another file",
    )
