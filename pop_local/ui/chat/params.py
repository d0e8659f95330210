"""/set: sampling parameters and answer length."""

from pop_converter.base.errors import PopError
from pop_converter.base.nearest import nearest_hint
from pop_local.config.settings import MOST, MOST_SEED, Setting, find, parse
from pop_local.engine.turn_options import TurnOptions
from pop_local.ui.chat.dialogue import Dialogue

# Fields of TurnOptions.
_PARAMS = (
    find("temperature"),
    Setting("top_k", int, least=0, most=MOST),
    find("top_p"),
    Setting("min_p", float, least=0, most=1),
    Setting("repeat_penalty", float, least=0.1),
    find("max_tokens"),
    Setting("seed", int, least=0, most=MOST_SEED),
)
PARAMS = {param.key: param for param in _PARAMS}
DEFAULT = "default"
_DEFAULTS = TurnOptions()


def set_param(chat: Dialogue, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if not name:
        for known in PARAMS:
            chat.screen.note(_line(chat, known))
        return
    param = PARAMS.get(name.lower())
    if param is None:
        hint = nearest_hint(name, {known: known for known in PARAMS}, "/set lists them.")
        chat.refuse(f"Unknown parameter {name}: {hint}")
        return
    name, text = name.lower(), text.strip()
    if text == DEFAULT:
        chat.sampling.pop(name, None)
    elif text:
        try:
            chat.sampling[name] = parse(param, text)
        except PopError as error:
            chat.refuse(f"{name}: {error.message} or {DEFAULT!r}.")
            return
    chat.screen.note(_line(chat, name))


def _line(chat: Dialogue, name: str) -> str:
    if name in chat.sampling:
        return f"{name} is {_shown(chat.sampling[name])}."
    if name in chat.model.engine.recommended:
        return (
            f"{name} is {_shown(chat.model.engine.recommended[name])} (recommended by the model)."
        )
    unset = {"max_tokens": "unlimited", "seed": "random"}
    return f"{name} is {unset.get(name) or _shown(getattr(_DEFAULTS, name))} (default)."


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
