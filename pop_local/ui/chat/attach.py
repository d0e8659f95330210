"""The commands /file and /image, which attach files to the next question."""

import os
import re
from pathlib import Path

from pop_local.config.settings import expanded
from pop_local.engine.images.pictures import read_picture
from pop_local.texts.document_readers import read_document
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.chat.overflow import answer_reserve, larger_ctx
from pop_local.ui.views.stats import counted_line, picture_line

# Context tokens reserved for the question and the template.
_QUESTION_TOKENS = 64
_ATTACHED = "Your next question will include the attachment."


def attach_file(chat: Dialogue, argument: str) -> None:
    if not argument:
        chat.refuse("/file needs a path.")
        return
    document = read_document(given_path(argument))
    context = chat.model.engine.context
    n_tokens = len(context.vocabulary.tokenize(document.text))
    chat.screen.note(counted_line(document.name, n_tokens, context.n_ctx))
    if _has_room(chat, n_tokens):
        chat.documents.append(document)
        chat.screen.note(_ATTACHED)


def attach_image(chat: Dialogue, argument: str) -> None:
    if not argument:
        chat.refuse("/image needs a path.")
        return
    engine = chat.model.engine
    picture = read_picture(given_path(argument))
    n_tokens = engine.prompter.count_picture(picture)
    chat.screen.note(picture_line(picture, n_tokens, engine.context.n_ctx))
    if _has_room(chat, n_tokens):
        chat.pictures.append(picture)
        chat.screen.note(_ATTACHED)


def _room_in(chat: Dialogue) -> int:
    """Return the number of context tokens left for attachments (may be negative)."""
    context, prompter = chat.model.engine.context, chat.model.engine.prompter
    messages = chat.session.conversation.messages
    n_messages = len(prompter.conversation(messages)) if messages else 0
    n_attached = sum(map(prompter.count_picture, chat.pictures))
    n_attached += sum(
        len(context.vocabulary.tokenize(attached.text)) for attached in chat.documents
    )
    n_answer = answer_reserve(chat.sampling.get("max_tokens"), context.n_ctx)
    return context.n_ctx - n_messages - n_attached - n_answer - _QUESTION_TOKENS


def _has_room(chat: Dialogue, n_tokens: int) -> bool:
    """Return True if an attachment fits in the context. If necessary, offer a larger context."""
    while n_tokens > (room := _room_in(chat)):
        n_larger = larger_ctx(chat.model.engine, n_tokens - room + chat.model.engine.context.n_ctx)
        larger = {"l": f"use a larger context (--ctx {n_larger})"} if n_larger else {}
        question = (
            f"The attachment is {n_tokens - room:,} tokens too long"
            f" (the context has room for {max(0, room):,} tokens)."
        )
        choice = chat.screen.choose(question, {**larger, "s": "skip it"})
        if choice != "l" or not n_larger or not chat.enlarge(n_larger):
            chat.has_failed |= choice is None
            chat.screen.note("Nothing was attached.")
            return False
    return True


def given_path(path: str) -> Path:
    """Remove the quotes or backslashes that terminals add to the path of a dropped file."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return expanded(path[1:-1])
    if os.sep == "/" and not expanded(path).exists():
        path = re.sub(r"\\(.)", r"\1", path)
    return expanded(path)
