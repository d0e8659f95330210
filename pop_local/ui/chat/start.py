"""From an opened model to a conversation in the terminal; `chat` and `demo` share it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.shape import read_shape
from pop_local.config.folders import history_file
from pop_local.measure.full_cost import FullCosts
from pop_local.ui.chat.dialogue import Dialogue, Opened
from pop_local.ui.chat.line import line_reader
from pop_local.ui.chat.repl import Repl
from pop_local.ui.chat.screen import Screen
from pop_local.ui.chat.slash import COMMANDS
from pop_local.ui.keys import unechoed_keys

if TYPE_CHECKING:
    from pop_local.engine.model import PopModel

# By name (None: the first one again) and context in tokens (None: as the options say).
OpenAgain = Callable[[str | None, int | None], "PopModel"]


def conversation(
    model: "PopModel",
    open_again: OpenAgain,
    screen: Screen,
    *,
    system: str = "",
    sampling: Mapping[str, Any],
) -> Dialogue:
    """A chat that can open other models and larger contexts."""

    def open_model(name: str | None, n_ctx: int | None) -> Opened:
        return _opened(open_again(name, n_ctx))

    return Dialogue(_opened(model), screen, system=system, sampling=sampling, open_model=open_model)


def talk(chat: Dialogue) -> None:
    """Returns when the user leaves, or the piped lines end."""
    words = {name: command.words for name, command in COMMANDS.items()}
    with unechoed_keys():
        Repl(chat, line_reader(history_file(), words)).run()


def _opened(model: "PopModel") -> Opened:
    return Opened(model, FullCosts(read_shape(Path(model.model_path)), model.boundary))
