"""/image: pictures that go with the next question."""

from pop_local.base.errors import PopError
from pop_local.engine.images.pictures import Picture, read_picture
from pop_local.ui.chat.attach import NEXT, choose, given_path, room_in
from pop_local.ui.chat.dialogue import Dialogue
from pop_local.ui.errors import as_pop_error
from pop_local.ui.views.stats import picture_line


def attach_image(chat: Dialogue, argument: str) -> None:
    if not argument:
        _list(chat)
        return
    try:
        picture = read_picture(given_path(argument))
        chat.screen.note(_counted(chat, picture))
        n_tokens = chat.model.count_picture(picture)
        while n_tokens > (room := room_in(chat)):
            if choose(chat, n_tokens, room) != "l":
                return
    except (OSError, PopError) as error:
        chat.fail(as_pop_error(error))
        return
    chat.pictures.append(picture)
    chat.screen.note(NEXT)


def _list(chat: Dialogue) -> None:
    if not chat.pictures:
        chat.screen.note("No picture is attached; /image PATH attaches one.")
    for picture in chat.pictures:
        chat.screen.note(_counted(chat, picture))


def _counted(chat: Dialogue, picture: Picture) -> str:
    return picture_line(picture, chat.model.count_picture(picture), chat.model.n_ctx)
