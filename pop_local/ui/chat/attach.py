"""The commands /file and /image, which attach files to the next question."""

import os
import re
from pathlib import Path

from pop_local.config.settings import expanded
from pop_local.engine.images.pictures import read_picture
from pop_local.texts.document_readers import read_document
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.views.stats import counted_line, picture_line

_ATTACHED = "Your next question will include the attachment."


def attach_file(chat: Dialogue, argument: str) -> None:
    if not argument:
        chat.refuse("/file needs a path.")
        return
    document = read_document(given_path(argument))
    context = chat.model.engine.context
    n_tokens = len(context.vocabulary.tokenize(document.text))
    chat.screen.note(counted_line(document.name, n_tokens, context.n_ctx))
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
    chat.pictures.append(picture)
    chat.screen.note(_ATTACHED)


def given_path(path: str) -> Path:
    """Remove the quotes or backslashes that terminals add to the path of a dropped file."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return expanded(path[1:-1])
    if os.sep == "/" and not expanded(path).exists():
        path = re.sub(r"\\(.)", r"\1", path)
    return expanded(path)
