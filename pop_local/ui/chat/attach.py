"""The commands /file, /glob and /image, which attach files to the next question."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from pop_converter.base.errors import PopError
from pop_local.config.settings import expanded
from pop_local.engine.images.pictures import Picture, read_picture
from pop_local.texts.document_readers import Document, read_document
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.overflow import answer_reserve, larger_ctx
from pop_local.ui.error_output import as_pop_error
from pop_local.ui.views.stats import counted_line, picture_line

# Context tokens reserved for the question and the template.
_QUESTION_TOKENS = 64
_MAX_FILES = 500
_ATTACHED = "Your next question includes the attachment."


# A document and its number of tokens.
_Counted = tuple[Document, int]


def attach_file(chat: Dialogue, argument: str) -> None:
    """Attach a file. Without an argument, list the attached files."""
    if argument:
        _offer(chat, [given_path(argument)], may_cut=True)
        return
    if not chat.documents:
        chat.screen.note("No file is attached; /file PATH attaches a file.")
    n_ctx = chat.model.engine.context.n_ctx
    for document in chat.documents:
        n_tokens = _count_tokens(chat, document.text)
        chat.screen.note(counted_line(document.name, n_tokens, n_ctx))


def attach_glob(chat: Dialogue, argument: str) -> None:
    if not argument:
        chat.refuse("/glob needs a pattern, for example docs/**/*.md.")
        return
    pattern = str(given_path(argument))
    found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (patterns may be absolute)
    paths = sorted(path for path in found if path.is_file() and path.stat().st_size)
    if not paths or len(paths) > _MAX_FILES:
        number = f"{len(paths)} files match" if paths else "No file matches"
        chat.refuse(f"{number} {argument}. Nothing was attached.")
        return
    _offer(chat, paths, may_cut=False)


def attach_image(chat: Dialogue, argument: str) -> None:
    """Attach a picture. Without an argument, list the attached pictures."""
    if not argument:
        if not chat.pictures:
            chat.screen.note("No picture is attached; /image PATH attaches a picture.")
        for picture in chat.pictures:
            _note_picture(chat, picture)
        return
    try:
        picture = read_picture(given_path(argument))
        n_tokens = _note_picture(chat, picture)
        while n_tokens > (room := _room_in(chat)):
            if _choose(chat, n_tokens, room, {}) is None:
                return
    except (OSError, PopError) as error:
        chat.fail(as_pop_error(error))
        return
    chat.pictures.append(picture)
    chat.screen.note(_ATTACHED)


def _note_picture(chat: Dialogue, picture: Picture) -> int:
    engine = chat.model.engine
    n_tokens = engine.prompter.count_picture(picture)
    chat.screen.note(picture_line(picture, n_tokens, engine.context.n_ctx))
    return n_tokens


def _offer(chat: Dialogue, paths: Sequence[Path], *, may_cut: bool) -> None:
    n_ctx = chat.model.engine.context.n_ctx
    files = [counted for path in paths if (counted := _counted(chat, path))]
    for document, n_tokens in files:
        chat.screen.note(counted_line(document.name, n_tokens, n_ctx))
    if len(files) > 1:
        chat.screen.note(counted_line(f"All {len(files)}", sum(n for _, n in files), n_ctx))
    if files:
        _attach(chat, files, may_cut)


def _attach(chat: Dialogue, files: Sequence[_Counted], may_cut: bool) -> None:
    room = _room_in(chat)
    sums = [*accumulate(n for _, n in files)]
    fitting = [document for (document, _), n in zip(files, sums, strict=True) if n <= room]
    chosen = "f"
    if len(fitting) < len(files):
        cuts = {}
        if may_cut and room > 0:
            cuts = {
                "b": f"attach only the first {room:,} tokens",
                "e": f"attach only the last {room:,} tokens",
            }
        elif fitting:
            cuts = {"f": f"attach only the first {len(fitting)} of {len(files)} files"}
        chosen = _choose(chat, sums[-1], room, cuts) or ""
    if chosen == "l":
        _attach(chat, files, may_cut)
        return
    if chosen == "f":
        chat.documents += fitting
    elif chosen in ("b", "e"):
        chat.documents.append(_cut(chat, files[0][0], room, chosen))
    if chosen:
        chat.screen.note(_ATTACHED)


def _count_tokens(chat: Dialogue, text: str) -> int:
    return len(chat.model.engine.context.vocabulary.tokenize(text))


def _room_in(chat: Dialogue) -> int:
    """Return the number of context tokens left for attachments, which may be negative."""
    n_ctx, prompter = chat.model.engine.context.n_ctx, chat.model.engine.prompter
    messages = chat.session.conversation.messages
    n_messages = len(prompter.conversation(messages)) if messages else 0
    n_attached = sum(map(prompter.count_picture, chat.pictures))
    n_attached += sum(_count_tokens(chat, each.text) for each in chat.documents)
    n_answer = answer_reserve(chat.sampling.get("max_tokens"), n_ctx)
    return n_ctx - n_messages - n_attached - n_answer - _QUESTION_TOKENS


def _choose(chat: Dialogue, n_tokens: int, room: int, cuts: Mapping[str, str]) -> str | None:
    """Ask the user what to do with an attachment that does not fit into the context.

    Return a key of `cuts`, "l" after enlarging the context, or None to attach nothing.
    """
    n_larger = larger_ctx(chat.model, n_tokens - room + chat.model.engine.context.n_ctx)
    larger = {"l": f"use a larger context (--ctx {n_larger})"} if n_larger else {}
    question = (
        f"The attachment is {n_tokens - room:,} tokens too long ({max(0, room):,} tokens left)."
    )
    chosen = chat.screen.choose(question, {**cuts, **larger, "s": "skip it"})
    if chosen == "l" and n_larger and chat.enlarge(n_larger):
        return "l"
    if chosen in (None, "s", "l"):
        chat.has_failed |= chosen is None
        chat.screen.note("Nothing was attached.")
        return None
    return chosen


def _counted(chat: Dialogue, path: Path) -> _Counted | None:
    try:
        document = read_document(path)
    except (OSError, PopError) as error:
        chat.fail(as_pop_error(error))
        return None
    return document, _count_tokens(chat, document.text)


def _cut(chat: Dialogue, document: Document, n_tokens: int, end: str) -> Document:
    context = chat.model.engine.context
    tokens = context.vocabulary.tokenize(document.text)
    kept = tokens[:n_tokens] if end == "b" else tokens[-n_tokens:]
    return replace(document, text=context.vocabulary.detokenize(kept))


def given_path(path: str) -> Path:
    """Return a path without the quotes or backslashes that terminals add on drag and drop."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return expanded(path[1:-1])
    if os.sep == "/" and not expanded(path).exists():
        path = re.sub(r"\\(.)", r"\1", path)
    return expanded(path)
